"""Commands of the command line that outgrew `moejax.cli`, one a file."""
