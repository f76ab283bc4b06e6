"""Table of the licenses of all dependencies, and NOTICE, in docs/reference/licenses.md.

    python docs/licenses.py

Reads the metadata of installed packages: install requirements.txt, requirements-gcs.txt,
requirements-onnx.txt, requirements-test.txt and requirements-docs.txt first.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCS = Path(__file__).parent
PAGE = DOCS / "reference" / "licenses.md"
SECTIONS = {
    "requirements.txt": "Installed with mixer_jax",
    "requirements-gcs.txt": "Installed by the extras `gcs` and `tpu`",
    "requirements-onnx.txt": "Installed by the extra `onnx`",
    "requirements-test.txt": "Installed for tests",
    "requirements-docs.txt": "Installed to build the documentation",
}
# Section with the notices of data that the package contains.
DATA = "Data in the package"
# Names of licenses in metadata, or the beginning of their text, and their SPDX identifiers.
_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License Version 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD 3-Clause": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "ISC license": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSFL": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
    # The classifier does not say which.
    "BSD License": "BSD",
}
_INTRODUCTION = """\
# Licenses of dependencies

mixer_jax is licensed under Apache-2.0; [one file](#data-in-the-package) has words of WordNet, under
WordNet's license. The tables list every package that is installed on Linux, and the license that
the package names. Wheels may contain libraries under other licenses, which their `*.dist-info`
directories list: those of OpenCV contain FFmpeg (LGPL-2.1), for example. Tests run the programs
hadolint and shellcheck (GPL-3.0) as processes. Accelerators need proprietary libraries: the extra
`cuda` installs NVIDIA's, under NVIDIA's licenses, and `tpu` installs libtpu, under the Google Cloud
Platform Terms of Service.

Written by `python docs/licenses.py`.
"""


def required_packages(path: Path) -> list[str]:
    """Lists the packages in a requirements file that this platform needs."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#-"]
    requirements = map(Requirement, lines)
    return sorted(
        {canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate()}
    )


def license_of(name: str) -> str:
    """Returns the license of an installed package, as an SPDX expression where it is known.

    Raises:
        ValueError: The package names no license, or an unknown one.
    """
    package = metadata.metadata(name)
    for expression in package.get_all("License-Expression") or []:
        return str(expression)
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in package.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    text = " ".join(" ".join(package.get_all("License") or []).split()).removeprefix("UNKNOWN")
    # Some packages have the whole text of their license in this field.
    if text and len(text) < 40:
        return _SPDX.get(text, text)
    beginnings = [spdx for beginning, spdx in _SPDX.items() if text.startswith(beginning)]
    known = beginnings or [_SPDX[name] for name in classifiers if name in _SPDX]
    if not text and not classifiers:
        # The metadata names none, but the package has the text.
        files = [
            file
            for file in metadata.files(name) or []
            if ".dist-info/licenses/" in str(file) or str(file).endswith(".dist-info/LICENSE")
        ]
        texts = " ".join(word for file in files for word in file.read_text().split())
        known = [spdx for title, spdx in _SPDX.items() if title in texts]
    if not known:
        raise ValueError(f"the license of {name} must be in _SPDX, got {classifiers} {text[:80]!r}")
    return " OR ".join(sorted(set(known)))


def format_page(root: Path) -> str:
    """Formats the page for the requirements files in a checkout."""
    page = _INTRODUCTION
    for file, title in SECTIONS.items():
        page += f"\n## {title}\n\n| package | license |\n|---|---|\n"
        for name in required_packages(root / file):
            page += f"| [{name}](https://pypi.org/project/{name}/) | {license_of(name)} |\n"
    notice = (root / "NOTICE").read_text(encoding="utf-8")
    page += f"\n## {DATA}\n\nThe file NOTICE, which is also in the wheel:\n\n"
    return f"{page}```text\n{notice}```\n"


if __name__ == "__main__":
    try:
        PAGE.write_text(format_page(DOCS.parent))
    except (metadata.PackageNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
