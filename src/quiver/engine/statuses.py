"""What can be said of a model, before and after it is loaded."""

import time
from dataclasses import replace
from pathlib import Path

from quiver.engine.model import Model
from quiver.models.catalogue import ModelSpec
from quiver.models.hub import is_local
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
