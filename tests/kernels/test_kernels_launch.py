"""Calls of Triton kernels from JAX: where there are any, and buffers that a result takes over."""

import importlib
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ahead import shape

from moejax.kernels import launch
from moejax.kernels.grouped import grouped_outer


def test_kernels_are_available_with_the_extra():
    assert launch.available()


def test_kernels_are_not_available_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not launch.available.__wrapped__()


@pytest.mark.parametrize(("capability", "runs"), [("8.0", False), ("9.0", True), ("10.0", False)])
def test_kernels_are_for_hopper_alone(capability, runs, monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert launch.available.__wrapped__() is runs


def test_what_keeps_jax_triton_from_loading_is_said(monkeypatch, caplog):
    def refuse(name):
        raise ImportError("jax-triton requires JAX to be installed with GPU support.\nAnd so on")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with caplog.at_level(logging.WARNING):
        assert not launch.available.__wrapped__()
    assert caplog.messages == ["no Triton kernels: jax-triton requires JAX to be installed with GPU support."]


@pytest.mark.hopper
def test_a_result_takes_over_the_buffer_it_adds_to():
    rows, dw, sizes = shape((256, 128), jnp.bfloat16), shape((2, 128, 128), jnp.float32), shape((2,), jnp.int32)
    step = jax.jit(lambda dw, x, dy, sizes: grouped_outer(x, dy, sizes, dw))
    (call,) = [
        line
        for line in step.trace(dw, rows, rows, sizes).lower(lowering_platforms=("cuda",)).as_text().splitlines()
        if "@triton_kernel_call" in line
    ]
    assert "operand_index = 3" in call
