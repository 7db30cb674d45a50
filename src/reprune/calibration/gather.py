"""From the config's sources to the texts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from reprune.calibration.mixture import Mixture
from reprune.calibration.roles import Texts
from reprune.calibration.same import Same
from reprune.calibration.source import Role, TextSet, TextSource
from reprune.calibration.tokens import Tokens
from reprune.calibration.windows import cut_windows
from reprune.errors import ConfigError
from reprune.model.loading import LoadedModel

Use = Literal["mask", "reconstruction", "validation", "probes"]
Source = TextSource | Mixture | Same


@dataclass(frozen=True)
class Request:
    """One text set to be cut: its name, what it is used for, its source and the config key it came from."""

    name: str
    use: Use
    source: TextSource
    key: str

    @property
    def role(self) -> Role:
        """Mask and reconstruction data are calibration text."""
        roles: dict[Use, Role] = {"validation": "validation", "probes": "probe"}
        return roles.get(self.use, "calibration")

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the windows these windows, but for model and seed."""
        source = self.source
        sizes = {
            "num_sequences": source.num_sequences,
            "length": source.length,
            "bos": source.bos,
            "cut": source.cut,
        }
        return {
            "name": self.name,
            "use": self.use,
            "part": source.split or self.role,
            **sizes,
            **source.chosen,
            **source.identity(),
        }


def requests_of(
    mask_data: Source, reconstruction_data: Source, validation: Mapping[str, Any], probes: Mapping[str, Any]
) -> list[Request]:
    """Every set of a run, `same` and mixtures resolved. ConfigError where a source cannot serve its role."""
    if isinstance(mask_data, Same):
        raise ConfigError(
            "calibration", "'same' stands for the mask data and cannot be it", accepted="another option"
        )
    own = _parts(mask_data)
    found = [
        Request(name or source.name, "mask", source, _key("calibration", name))
        for name, source in own.items()
    ]
    key = "reconstruction_data"
    data = _resolved(reconstruction_data, mask_data)
    found += [
        Request(name or source.name, "reconstruction", source, _key(key, name))
        for name, source in _parts(data).items()
    ]
    for use, group in (("validation", validation), ("probes", probes)):
        for name, option in group.items():
            if option is None:
                continue
            if isinstance(option, Same) and any(isinstance(source, Tokens) for source in own.values()):
                raise ConfigError(
                    f"{use}.{name}",
                    "'same' means another part of the mask data's source, and exact tokens have no other part",
                    accepted="web, domain, wiki, code, …, or null",
                    hint=f"calibration@{use}.{name}=web, or {use}.{name}=null to leave it out",
                )
            for part, source in _parts(_resolved(option, mask_data)).items():
                full = f"{name}_{part}" if part else name
                found.append(Request(full, use, source, _key(f"{use}.{name}", part)))  # type: ignore[arg-type]
    return found


def _key(base: str, part: str) -> str:
    return f"{base}.parts.{part}" if part else base


def _resolved(source: Source, mask_data: Source) -> Source:
    if not isinstance(source, Same):
        return source
    if isinstance(mask_data, Mixture):
        parts = {name: source.resolve(part) for name, part in mask_data.resolve().items()}
        return Mixture(parts=parts)
    assert isinstance(mask_data, TextSource)
    return source.resolve(mask_data)


def _parts(source: Source) -> dict[str, TextSource]:
    if isinstance(source, Mixture):
        return source.resolve()
    assert isinstance(source, TextSource)
    return {"": source}


def cut_all(
    requests: Sequence[Request], tokenizer: Any, model: LoadedModel | None, seed: int
) -> tuple[Texts, list[Request]]:
    """Cut every request that needs no model, or all of them when there is one; the others are returned as waiting."""
    texts = Texts()
    waiting = []
    uses = {"mask": texts.mask, "reconstruction": texts.reconstruction, "validation": texts.validation}
    known: dict[str, TextSet] = {}
    for request in requests:
        if request.source.needs_model and model is None:
            waiting.append(request)
            continue
        made = cut_windows(
            request.source,
            role=request.role,
            tokenizer=tokenizer,
            model=model,
            seed=seed,
            key=request.key,
            name=request.name,
        )
        if request.role == "calibration":
            made = _one_name_each(made, known)
        uses.get(request.use, texts.probes).append(made)
    return texts, waiting


def _one_name_each(text: TextSet, known: dict[str, TextSet]) -> TextSet:
    """The set itself, or the one with the same tokens that is there already, or under a name not yet taken."""
    for other in known.values():
        if other.key == text.key:
            return other
    name = text.name
    number = 2
    while name in known:
        name, number = f"{text.name}_{number}", number + 1
    known[name] = replace(text, name=name)
    return known[name]
