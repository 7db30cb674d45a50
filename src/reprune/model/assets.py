"""Models and text that come as wheels of a package index: pinned, checked, unpacked into the cache."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from reprune.cache import cache_root, cached_folder
from reprune.errors import ConfigError, RunError
from reprune.files import sha256_of_file, sha256_of_json


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: name and version on the index, sha256 of the file, and the members wanted from it."""

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def key(self) -> dict[str, object]:
        """What identifies the unpacked folder."""
        return {
            "package": self.package,
            "version": self.version,
            "sha256": self.sha256,
            "members": list(self.members),
        }

    def cached(self) -> Path | None:
        """The unpacked folder if it is in the cache."""
        folder = cache_root() / "wheels" / sha256_of_json(self.key)[:32]
        return folder if folder.is_dir() else None

    def fetch(self) -> Path:
        """The folder with the members, downloaded once with pip and checked.

        Raises RunError when the index cannot be reached or the file is not the pinned one.
        """
        return cached_folder("wheels", self.key, self._unpack)

    def require(self, key: str) -> Path:
        """The folder from the cache or the index; a ConfigError for `key` says what to do if neither has it."""
        try:
            return self.fetch()
        except RunError as error:
            raise ConfigError(
                key,
                f"the wheel {self.package} {self.version} is neither in the cache nor to be had: {error}",
                hint="run 'python -m reprune.fetch' once while a package index is within reach",
            ) from error

    def _unpack(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--disable-pip-version-check", "--dest", download, f"{self.package}=={self.version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = sorted(Path(download).glob("*.whl"))
            if done.returncode != 0 or not found:
                last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise RunError(f"downloading {self.package}=={self.version} failed: {last}")
            actual = sha256_of_file(found[0])
            if actual != self.sha256:
                raise RunError(
                    f"{self.package}=={self.version} has sha256 {actual}, pinned is {self.sha256}: not used"
                )
            with zipfile.ZipFile(found[0]) as archive:
                for member in self.members:
                    (folder / Path(member).name).write_bytes(archive.read(member))


TEXTS = Wheel(
    "exllamav2",
    "0.3.2",
    "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
    tuple(
        f"exllamav2/conversion/standard_cal_data/{name}.utf8"
        for name in ("c4", "wiki", "technical", "code", "tiny")
    ),
)
"""C4, Wikipedia, technical prose, code and TinyStories: calibration text that ships in a wheel."""
