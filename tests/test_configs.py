"""Every option of every group composes, and its keys are its constructor's arguments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import overrides_for
from reprune.build import build
from reprune.check import check
from reprune.compose import compose_run, jobs_of
from reprune.config_files import config_root, options_of
from reprune.errors import ConfigError
from reprune.help import METHODS, methods_table, options
from reprune.reporting.comparisons import claims_in
from reprune.rules import left_out
from reprune.schema import RunConfig
from reprune.sweep import Sweep

ROOT = config_root()
CONF = ROOT / "conf"
GLOBAL = ("method", "experiments", "arm", "sweeps", "launcher")
"""Groups whose files are deltas on the whole config, not one node."""
OPTIONS = [
    (path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name not in GLOBAL
]
EXPERIMENTS = options_of("experiments")
ARMS = sorted(path.stem for path in (CONF / "arm").glob("*.yaml"))
SWEEPS = options_of("sweeps")
CLAIMS = sorted((ROOT / "experiments").rglob("claims*.yaml"))
VALUES = {
    ("model", "local", "path"): "a_folder",
    ("calibration", "tokens", "path"): "tokens.safetensors",
    ("pruner", "mask", "path"): "masks.safetensors",
    ("transform", "block_drop", "count"): "1",
    ("evaluation", "summarisation", "summaries.path"): "articles.jsonl",
}
"""What options with keys that have to be set are given here."""


def _yaml(group: str, option: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
    return content


def _given(group: str, option: str) -> list[str]:
    return [
        f"{group}.{key}={value}" for (of, name, key), value in VALUES.items() if (of, name) == (group, option)
    ]


def _nodes(content: Any) -> Iterator[Mapping[str, Any]]:
    """Every node with a target, at any depth."""
    if isinstance(content, Mapping):
        if "_target_" in content:
            yield content
        for value in content.values():
            yield from _nodes(value)


def _constructor(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _built(config: Mapping[str, Any]) -> int:
    """Build every node of a composed config; how many there were."""
    count = 0
    for key, value in config.items():
        for name, node in (
            value.items() if isinstance(value, Mapping) and "_target_" not in value else [("", value)]
        ):
            if isinstance(node, Mapping) and "_target_" in node:
                build(node, f"{key}.{name}" if name else key)
                count += 1
    return count


def test_the_issues_options_are_there() -> None:
    """Catches an option that was renamed: the names are part of the contract."""
    wanted = {
        "model": "smollm2_135m gemma3_270m opt_125m llama_7b llama3_8b qwen3_0_6b local tiny",
        "calibration": "web domain generated self_calibration continued vocabulary tokens mixture same",
        "pruner": "none random magnitude wanda sparsegpt mask",
        "pattern": "unstructured 2to4 4to8",
        "allocation": "uniform",
        "schedule": "one_shot iterative",
        "reconstruction": "none least_squares submodule br br_gp br_gp_cr window free_lunch bias_norm masked_lora full",
        "evaluation": "none quick perplexity field fidelity zero_shot zero_shot_self_calibration knowledge reasoning generation summarisation",
        "tracking": "wandb jsonl",
    }
    there = set(OPTIONS)
    assert {(group, option) for group, options in wanted.items() for option in options.split()} <= there
    assert set(ARMS) >= {"none", "br", "br_gp", "br_gp_cr", "br_gp_cr_generated"}
    assert "quickstart" in EXPERIMENTS


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_builds(group: str, option: str) -> None:
    """Catches an option that names a class, a key or a value that no longer exists."""
    composed = compose_run([f"{group}={option}", *_given(group, option)])
    node = composed.config[group]
    assert composed.choices[group] == option
    if group == "evaluation":
        for name, entry in node.items():
            build(entry, f"{group}.{name}", composed.where)
        assert set(node) == set(_yaml(group, option))
    else:
        built = build(node, group, composed.where)
        assert type(built).__name__ == node["_target_"].rpartition(".")[2]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_keys_are_the_constructors_arguments(group: str, option: str) -> None:
    """Catches a key nobody reads, and an argument that the option file does not show."""
    content = _yaml(group, option)
    nodes = list(_nodes(content))
    assert nodes or not content, "an option without a target"
    for node in nodes:
        accepted = set(inspect.signature(_constructor(node["_target_"])).parameters)
        keys = set(node) - {"_target_", "defaults"}
        # Nested options come from the defaults list: `web@parts.web` fills the argument `parts`.
        defaults = [entry for entry in node.get("defaults", []) if isinstance(entry, str) and "@" in entry]
        keys |= {entry.partition("@")[2].split(".")[0] for entry in defaults}
        assert keys == accepted, node["_target_"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_says_what_it_is(group: str, option: str) -> None:
    """Catches an option that `reprune --help` shows without a word."""
    first = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 4


def test_methods_say_what_they_cost_and_the_readme_has_their_table() -> None:
    """Catches a method without a word on its cost, and a README that lists other methods (`make options` writes it)."""
    for group in METHODS:
        for name, described in options(group).items():
            assert described.cost, f"{group}={name}"
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- make options: begin -->\n")[2]
    assert table.startswith(methods_table())
    assert {path.parent.name for path in CONF.glob("*/*.yaml")} >= set(METHODS)


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "calibration"])
def test_source_serves_every_place(option: str) -> None:
    """Catches a source that works as mask data only: the options are the same for the other texts."""
    places = ["calibration@reconstruction_data", "calibration@probes.wiki", "+calibration@validation.mine"]
    values = {place: place.rpartition("@")[2] for place in places}
    given = [
        f"{node}.{key}={value}"
        for node in values.values()
        for (_, name, key), value in VALUES.items()
        if name == option
    ]
    config = compose_run([*(f"{place}={option}" for place in places), *given]).config
    nodes = [config["reconstruction_data"], config["probes"]["wiki"], config["validation"]["mine"]]
    assert len({type(build(node, "text")) for node in nodes}) == 1


def test_nothing_is_left_out() -> None:
    """Catches a file that is neither an option nor a list of claims, and that no test looks at."""
    experiments = {path.relative_to(ROOT / "experiments") for path in (ROOT / "experiments").rglob("*.yaml")}
    listed = {Path(f"{name}.yaml") for name in EXPERIMENTS}
    assert experiments == listed | {path.relative_to(ROOT / "experiments") for path in CLAIMS}
    assert {"reconstruction_grid", "granularity"} <= set(SWEEPS)


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_claims_are_claims(path: Path) -> None:
    """Catches a claim with a field that there is none of, and two of one name."""
    claims = claims_in(path)
    assert len({claim.name for claim in claims}) == len(claims) > 0


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes(experiment: str) -> None:
    """Catches an experiment, or a point of its sweep, that sets what no longer exists."""
    jobs = list(jobs_of([f"experiments={experiment}"]))
    assert jobs
    # Every value of the large grids is looked at in test_studies.
    for overrides in jobs if len(jobs) < 50 else (jobs[0], jobs[-1]):
        composed = compose_run(overrides)
        assert _built(composed.config) >= 9
        assert composed.config["experiment"] != "default", "an experiment names its W&B group"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sweeps" / "wandb").glob("*.yaml")), ids=lambda path: path.stem
)
def test_wandb_sweep_composes(path: Path, tmp_path: Path) -> None:
    """Catches an agent whose every run is refused, and a metric that no run logs."""
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    interpreter, module, *fixed, arguments = sweep["command"][1:]
    assert (interpreter, module, fixed[0], arguments) == (
        "${interpreter}",
        "-m",
        "reprune.run",
        "${args_no_hyphens}",
    )
    ends = [
        (
            key,
            [wanted["value"]]
            if "value" in wanted
            else wanted.get("values") or [wanted["min"], wanted["max"]],
        )
        for key, wanted in sweep["parameters"].items()
    ]
    for values in zip_longest(*(values for _, values in ends)):
        given = [f"{key}={value}" for (key, _), value in zip(ends, values, strict=True) if value is not None]
        config = compose_run([*fixed[1:], *given]).config
        assert all(name in config["validation"] for name in [sweep["metric"]["name"].split("/")[2]])
    assert sweep["metric"]["name"].startswith("reconstruction/validation/"), "nothing is chosen on a probe"


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("experiment", [None, "quickstart"])
def test_arm_composes(arm: str, experiment: str | None) -> None:
    """Catches an arm that composes alone but not in the experiment it is for."""
    overrides = [f"arm={arm}", *([f"experiments={experiment}"] if experiment else [])]
    composed = compose_run(overrides)
    assert composed.choices["arm"] == arm
    assert _built(composed.config) >= 9


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweep_passes_a_dry_run(sweep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a grid over keys or options that no longer exist, whose points cannot run, or are the same run."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))
    texts = ["~reconstruction_data.parts.web"] if sweep == "generated_samples" else []
    texts += ["calibration@validation.web=vocabulary"] if sweep == "learning_rate_epochs" else []
    # What the grid runs over is not given; texts are the test's own all the same.
    grid = compose_run([f"sweeps={sweep}"]).hydra["params"]
    tiny = [it for it in overrides_for(tmp_path) if it.split("=")[0] not in set(grid) - {"calibration"}]
    points = [compose_run(overrides) for overrides in jobs_of([*tiny, *texts, f"sweeps={sweep}"])]
    wanted = [point for point in points if not left_out(point)]
    whole = Sweep.of([check(point) for point in wanted], len(points) - len(wanted))
    assert whole.num_duplicates == 0
    assert len(whole.plans) >= 6
    assert _built(points[0].config) >= 8
    assert points[0].config["experiment"] == sweep


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweep_composes_at_its_corners(sweep: str) -> None:
    """Catches a grid that fits the tiny model only."""
    jobs = list(jobs_of([f"sweeps={sweep}"]))
    for overrides in (jobs[0], jobs[-1]):
        assert _built(compose_run(overrides).config) >= 9


@pytest.mark.parametrize("launcher", ["laptop", "box", "ray", "slurm"])
def test_launcher_is_there_or_says_what_to_install(launcher: str) -> None:
    """Catches a launcher that became part of a run, and a missing extra told of in Hydra's words."""
    first = (CONF / "launcher" / f"{launcher}.yaml").read_text(encoding="utf-8").splitlines()[1]
    assert first.startswith("# ")
    extra = {"box": "ray"}.get(launcher, launcher)
    plugin = {"ray": "hydra_ray_launcher", "slurm": "hydra_submitit_launcher"}.get(extra)
    plugins = importlib.util.find_spec("hydra_plugins")
    if plugin is None or (plugins and importlib.util.find_spec(f"hydra_plugins.{plugin}")):
        composed = compose_run([f"launcher={launcher}"])
        assert composed.config == compose_run([]).config
        assert composed.choices == compose_run([]).choices
        return
    with pytest.raises(ConfigError) as caught:
        compose_run([f"launcher={launcher}"])
    assert caught.value.key == "launcher"
    assert f"pip install 'reprune[{extra}]'" in caught.value.screen()


def test_arms_differ_from_each_other_only_in_what_they_are_about() -> None:
    """Catches arms that are compared although they differ in more than reconstruction and its text."""

    def rest(arm: str) -> dict[str, Any]:
        config = compose_run(["experiments=quickstart", f"arm={arm}"]).config
        return {
            key: value
            for key, value in config.items()
            if key not in {"reconstruction", "reconstruction_data", "probes"}
        }

    assert all(rest(arm) == rest("none") for arm in ARMS)
    trained = [
        compose_run(["experiments=quickstart", f"arm={arm}"]).config["reconstruction"]
        for arm in ARMS
        if arm != "none"
    ]
    for key in ("epochs", "batch_size", "learning_rate", "optimiser", "loss", "trainable"):
        assert len({str(technique[key]) for technique in trained}) == 1, key


def test_every_top_level_key_of_the_config_is_in_the_schema() -> None:
    """Catches a key in conf/config.yaml that the schema does not type."""
    assert set(compose_run([]).config) <= set(RunConfig.__dataclass_fields__)


def test_config_files_end_with_a_newline_and_hold_no_tabs() -> None:
    """Catches files that YAML reads but people's tools do not."""
    for path in [*CONF.rglob("*.yaml"), *Path(ROOT / "experiments").rglob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert text.endswith("\n"), path
        assert "\t" not in text, path


def test_arm_none_does_not_reconstruct() -> None:
    """Catches an experiment's optimiser settings that turn the row 'what the pruner leaves' into another one."""
    composed = compose_run(["experiments=quickstart", "arm=none"])
    assert composed.config["reconstruction"]["epochs"] > 0
    assert not build(composed.config["reconstruction"], "reconstruction").trains
