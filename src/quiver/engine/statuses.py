"""What can be said of a model, before and after it is loaded."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quiver.capacity import Activity
from quiver.engine.model import Model
from quiver.models.catalogue import ModelSpec
from quiver.models.hub import is_local
from quiver.telemetry.observer import Figure
from quiver.types import ModelState, ModelStatus


def unknown(name: str) -> ModelStatus:
    """Say what is known of a model outside the catalogue: the id that it will have. A directory's is its own name."""
    own_name = Path(name).expanduser().resolve().name if is_local(name) else name
    return ModelStatus(id=own_name, state=ModelState.AVAILABLE)


def known(spec: ModelSpec) -> ModelStatus:
    """Say what the catalogue knows of a model."""
    return ModelStatus(
        id=spec.id,
        state=ModelState.AVAILABLE,
        kind=spec.kind,
        description=spec.description,
        pooling=spec.pooling,
        revision=spec.revision,
        aliases=spec.aliases,
        dimensions=spec.dimensions,
        max_tokens=spec.max_tokens,
        prompts=tuple(spec.prompts),
        labels=spec.labels,
    )


def loaded(model: Model, *, batch_tokens: int, num_bytes: int, batch_invariant: bool) -> ModelStatus:
    """Say what is known of a model that serves."""
    return replace(
        known(model.spec),
        state=ModelState.READY,
        created=int(time.time()),
        backend=model.backend.name,
        dtype=model.dtype,
        batch_tokens=batch_tokens,
        num_bytes=num_bytes,
        num_special_tokens=model.tokenizer.num_head + model.tokenizer.num_tail,
        batch_invariant=batch_invariant,
    )


def figures(statuses: Sequence[ModelStatus], activities: Mapping[str, Activity]) -> Sequence[Figure]:
    """Count models by what they are doing, and tell what waits for those that are loaded, by their ids, and runs."""
    number = Counter(status.state for status in statuses)
    ready = {status.id: status for status in statuses if status.id in activities}
    of_each = activities.items()

    def of_model(name: str, meaning: str, values: Mapping[str, float]) -> Figure:
        return Figure(name, meaning, values, "model")

    return (
        Figure("quiver_models", "Models by what they are doing.", {str(s): number[s] for s in ModelState}, "state"),
        of_model("quiver_model_bytes", "Size of a model's weights.", {i: s.num_bytes for i, s in ready.items()}),
        of_model(
            "quiver_batch_invariant",
            "1 where vectors are bit-identical alone and packed.",
            {i: s.batch_invariant for i, s in ready.items()},
        ),
        of_model("quiver_waiting_inputs", "Inputs that wait for a lane.", {i: a.waiting_inputs for i, a in of_each}),
        of_model("quiver_waiting_tokens", "Tokens that wait for a lane.", {i: a.waiting_tokens for i, a in of_each}),
        of_model(
            "quiver_waiting_seconds",
            "How long the input that is due first has waited.",
            {i: a.overdue_seconds for i, a in of_each},
        ),
        of_model("quiver_lanes", "Forward passes that may run at a time.", {i: a.lanes for i, a in of_each}),
        of_model("quiver_busy_lanes", "Forward passes that run.", {i: a.busy_lanes for i, a in of_each}),
    )
