"""Whether a model computes a text that is packed behind another one as if it were alone."""

from __future__ import annotations

from weakref import WeakSet

import torch

from reprune.errors import RunError
from reprune.model.blocks import placed
from reprune.model.description import first_line
from reprune.model.documents import documents_apart
from reprune.model.loading import LoadedModel

_ROUNDING = 64
_NOT_APART = (
    "does not keep documents apart that are packed into one window; "
    "use cut=crop, or cross_documents=true on the packed text"
)

_KNOWN: WeakSet[LoadedModel] = WeakSet()
"""Models that were looked at already: where weights rest on disk, each look reads all of them."""


@torch.no_grad()
def check_texts_apart(model: LoadedModel) -> None:
    """RunError for a model in which a text that is packed behind another one is not computed as if it were alone.

    Such are models that carry a state from token to token, or count positions in a way of their own.
    """
    if model in _KNOWN:
        return
    first, second = torch.zeros(1, 3, dtype=torch.long), torch.arange(1, 6).unsqueeze(0)
    places = torch.cat([torch.arange(3), torch.arange(5)]).unsqueeze(0)
    both = torch.cat([first, second], dim=1)
    told = placed(model.model, places)
    try:
        with model.on_host(), documents_apart(model.blocks, places):
            packed = model.model(input_ids=both, use_cache=False, **told).logits[:, len(first[0]) :]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise RunError(f"{model.name} {_NOT_APART} ({first_line(error)})") from error
    with model.on_host():
        alone = model.model(input_ids=second, use_cache=False).logits
    off = float((packed - alone).abs().max())
    if off > _ROUNDING * torch.finfo(alone.dtype).eps * float(alone.abs().max()):
        raise RunError(f"{model.name} {_NOT_APART}")
    _KNOWN.add(model)
