"""WikiText-2, PTB and C4 as the field's perplexities take them: rows of a data set of the hub, joined by a string."""

from __future__ import annotations

from dataclasses import dataclass

from reprune.calibration.hub import kept_or_streamed
from reprune.calibration.hub_places import UnavailableError, Wanted, from_mirror
from reprune.errors import ConfigError, require_positive

_ALL = 10**9


@dataclass(frozen=True)
class Rows:
    """The rows of a text, blank ones among them; its documents, without; and where they came from."""

    rows: list[str]
    documents: list[str]
    used: str


@dataclass(frozen=True, kw_only=True)
class FieldText:
    """The first `num_rows` rows (null: all) of a data set's split, to be joined by `joiner` and tokenised once.

    Rows are taken as they are: nothing is stripped, nothing that stands twice is left out; blank rows only where `lines` is
    false. `lines` says that rows are the lines of a file, blank ones among them, the first one blank, as in WikiText. At most `max_windows` windows are
    scored (null: all). `revision` and `mirror` (a folder in the layout of the data set's repository) as in HubText.

    How each text is joined: `get_wikitext2`, `get_ptb`, `get_c4` in sparsegpt's datautils.py
    (github.com/IST-DASLab/sparsegpt, commit 54c8443), which the study took over unchanged
    (github.com/LOG-postech/rethinking-LLM-pruning, lib/data.py, commit 4a55ec9): WikiText-2's test rows by two
    newlines; PTB's *test* sentences by a space (GPTQ's older loader: its validation sentences by two newlines); C4's
    first 1,100 validation documents by a space, of which the first 256 windows count.
    """

    dataset: str
    config: str | None
    data_split: str
    revision: str
    text_field: str
    lines: bool
    joiner: str
    num_rows: int | None
    max_windows: int | None
    mirror: str | None = None

    def __post_init__(self) -> None:
        require_positive(num_rows=self.num_rows, max_windows=self.max_windows)

    def read(self, key: str) -> Rows:
        """The rows. Raises ConfigError below `key`, with what was tried, where they cannot be had."""
        wanted = Wanted(
            dataset=self.dataset,
            config=self.config,
            data_split=self.data_split,
            revision=self.revision,
            text_field=self.text_field,
            join="articles" if self.lines else "rows",
            num_documents=_ALL if self.lines or self.num_rows is None else self.num_rows,
            mirror=self.mirror,
            fallback=None,
        )
        try:
            documents, used = from_mirror(wanted) if self.mirror is not None else kept_or_streamed(wanted)
        except UnavailableError as error:
            raise self._missing(str(error), key) from error
        except ConfigError as error:
            raise error.under(key) from error
        if not documents:
            raise ConfigError(f"{key}.dataset", "no row has text", value=f"{self.dataset}, {used}")
        rows = documents
        if self.lines:
            # Articles hold every line, in its order; of what stands before the first heading only blank is left out.
            rows = ["", *(line for article in documents for line in _lines(article))]
            if self.num_rows is not None:
                rows = rows[: self.num_rows]
        return Rows(rows, documents, used)

    def _missing(self, tried: str, key: str) -> ConfigError:
        name = f"{self.dataset} {self.config or ''}".strip()
        return ConfigError(
            f"{key}.dataset" if self.mirror is None else f"{key}.mirror",
            f"this text cannot be had; tried {tried}",
            value=f"{name}, {self.data_split}, at {self.revision}",
            accepted=f"network; what an earlier run or `datasets` kept; {key}.mirror=FOLDER",
            hint=f"offline: copy the repository's README.md and the files of one config and split, and set {key}.mirror",
        )


def _lines(article: str) -> list[str]:
    """The rows that were put together; a blank one is the empty string, as in the data set."""
    rows = [f"{line}\n" for line in article.removesuffix("\n").split("\n")]
    return ["" if row == "\n" else row for row in rows]
