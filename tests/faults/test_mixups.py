"""No vector goes to another input, request or connection: every reply is held against the lone run's bits."""

import asyncio
import base64
import json
import random

import numpy as np
import pytest

from conftest import MINILM, minilm_files, settings
from faults.load import Pool, embed
from faults.mixing import faults_of
from faults.servers import BASE64, client_process, stub
from quiver.bench.workload import stream
from quiver.engine import model as loading
from quiver.models.catalogue import Catalogue
from server_process import serving

__all__ = ["minilm_files"]

PROCESSES = 3
CONNECTIONS = 70
"""Of each process: 210 together."""
SHORT_WORDS = 5


def checked(url, vectors, *, processes=PROCESSES, connections=CONNECTIONS):
    """Let several client processes check so many vectors together; returns their tallies added up."""
    share = -(-vectors // processes)
    clients = [
        client_process("faults.mixing", url, f"--connections={connections}", f"--vectors={share}", f"--seed={seed}")
        for seed in range(1, processes + 1)
    ]
    tallies = [json.loads(client.communicate()[0]) for client in clients]
    total = {name: sum(tally[name] for tally in tallies) for name in ("vectors", "requests", "cut", "wrong")}
    statuses = {status for tally in tallies for status in tally["statuses"]}
    return total, statuses, [fault for tally in tallies for fault in tally["faults"]]


@pytest.mark.parametrize("vectors", [50_000, pytest.param(1_000_000, marks=pytest.mark.faults)])
def test_no_vector_is_mixed_up(vectors, capsys):
    """Over 210 connections of three processes, with batches, models and forms in random order and some cut off, all is right."""
    with stub(models=3) as server:
        total, statuses, faults = checked(server.ready_url(), vectors)
    with capsys.disabled():
        print(f" ({total}) ", end="")  # noqa: T201  the figures
    assert (total["wrong"], faults) == (0, [])
    assert statuses == {"200"}
    assert total["vectors"] >= vectors
    assert total["cut"] > total["requests"] / 50


def test_a_server_that_swaps_two_vectors_is_found_out():
    """Negative control: one batch in forty with two vectors in the wrong order is seen."""
    with stub(models=3, behave={"swap_every": 40}) as server:
        total, _, faults = checked(server.ready_url(), 20_000, processes=1)
    assert total["wrong"] >= 2
    assert faults


def sentences(count):
    """Return distinct texts: most are a few words, some a paragraph."""
    rng = random.Random(0)  # noqa: S311  repeatable on purpose
    texts = (
        text if rng.random() < 0.01 else " ".join(text.split()[: rng.randint(1, SHORT_WORDS)]) for text in stream(3)
    )
    found = {}
    while len(found) < count:
        found.setdefault(next(texts))
    return list(found)


def alone(files, texts):
    """Return each text's vector in base64, computed with nothing beside it."""
    model = loading.load(Catalogue.load().find(MINILM), files, settings(), lanes=1)
    try:
        encodings = model.tokenizer.encode(texts, truncate=False)
        vectors = [model.compute([encoding])[0] for encoding in encodings]
    finally:
        model.backend.close()
    assert all(vector.dtype == np.float32 for vector in vectors)
    return [base64.b64encode(vector.tobytes()).decode() for vector in vectors]


@pytest.mark.parametrize(
    ("num_texts", "vectors"), [(300, 3_000), pytest.param(2_000, 100_000, marks=pytest.mark.faults)]
)
async def test_the_real_model_gives_the_lone_run_s_bits_under_load(minilm_files, num_texts, vectors):
    """Every vector of the default model equals, in every bit, the one that its text has alone in a process of its own."""
    texts = sentences(num_texts)
    right = alone(minilm_files, texts)
    seen, wrong = 0, []

    async def client(pool, seed):
        nonlocal seen
        rng = random.Random(seed)  # noqa: S311  repeatable on purpose
        while seen < vectors:
            chosen = rng.choices(range(num_texts), k=rng.choice((1, 3, rng.randint(1, 64))))
            answer = await pool.ask(embed([texts[i] for i in chosen], **BASE64), patience=60)
            assert answer.status == 200, answer
            seen += len(chosen)
            wrong.extend(faults_of(answer, [right[i] for i in chosen]))

    with serving("--cache-entries", "0") as server:
        async with Pool(server.ready_url()) as pool:
            await asyncio.gather(*(client(pool, seed) for seed in range(24)))
    assert wrong == []
    assert seen >= vectors


def test_another_text_s_vector_is_found_out(minilm_files):
    """Negative control: two of the real model's vectors in the wrong order are two faults."""
    first, second = alone(minilm_files, ["one text", "another text"])
    body = [{"index": i, "embedding": vector} for i, vector in enumerate((second, first))]

    class Swapped:
        """A reply."""

        def json(self):
            """Return its body."""
            return {"data": body}

    assert len(faults_of(Swapped(), [first, second])) == 2
