"""Who goes through a library and who loads from it."""

from __future__ import annotations

import os

from prefetch.walkers import MODELS, WINDOW_S, Walkers, process_of


def test_a_few_models_are_loaded_and_more_are_a_walk() -> None:
    walkers = Walkers()
    paths = [b"m%d/config.json" % number for number in range(MODELS + 1)]
    assert [walkers.is_walking(7, path, 1.0) for path in paths] == [False] * MODELS + [True]
    assert not walkers.is_walking(8, paths[0], 1.0), "another process is not the one that walks"


def test_one_model_may_be_opened_as_often_as_one_likes() -> None:
    walkers = Walkers()
    assert not any(walkers.is_walking(7, b"m/%d.safetensors" % number, 1.0) for number in range(100))


def test_models_opened_long_ago_do_not_count() -> None:
    walkers = Walkers()
    assert not any(walkers.is_walking(7, b"m%d/config.json" % n, n * WINDOW_S / MODELS * 1.1) for n in range(20))


def test_the_folders_of_a_pipeline_are_one_model() -> None:
    walkers = Walkers()
    assert not walkers.is_walking(7, b"flux/model_index.json", 1.0)
    for part in (b"text_encoder", b"text_encoder_2", b"tokenizer", b"transformer", b"vae"):
        assert not walkers.is_walking(7, b"flux/" + part + b"/config.json", 1.0)


def test_a_thread_belongs_to_its_process() -> None:
    with open("/proc/self/comm") as comm:
        assert process_of(os.getpid()) == (os.getpid(), comm.read().strip())
    assert process_of(1 << 30) == (1 << 30, "")
