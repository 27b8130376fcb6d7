"""The pipeline: schedules as data, and what runs them."""
