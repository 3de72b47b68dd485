"""Single licenses: their ids on the Hub, which of them bind, and what those of Llama and Gemma demand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

UNKNOWN, OTHER = "unknown", "other"  # ids of the Hub too
# https://huggingface.co/docs/hub/repositories-licenses
IDS = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear "
    "c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 "
    "cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl "
    "ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 "
    "lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl "
    "openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 "
    "llama4 grok2-community gemma unknown other"
)
LICENSE_IDS = tuple(IDS.split())
# A model made from such models may have any license; the last ask for the most.
PERMISSIVE = (
    *("unlicense", "cc0-1.0", "zlib", "isc", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cdla-permissive-2.0"),
    *("cc-by-4.0", "apache-2.0"),
)
META = "Copyright © Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True)
class Terms:
    """What a license demands of every model that was made from one under it.

    Attributes:
        license: Id of the license on the Hub.
        names: What is in the name of a model under it, as a regular expression.
        notice: Line that the file NOTICE has to have.
        shown: Words that the card has to show.
        beginning: With which the name of the model has to begin; `-`, `_`, `.` and spaces do not count.
    """

    license: str
    names: str
    notice: str
    shown: str = ""
    beginning: str = ""

    def fits_name(self, name: str) -> bool:
        """Whether a name, or that in a Hub id, begins as it has to."""
        bare, beginning = (re.sub(r"[-_. ]", "", text) for text in (name.split("/")[-1], self.beginning))
        return bare.startswith(beginning)


def _llama(version: str, shown: str, beginning: str, name: str) -> Terms:
    pattern = rf"\bLlama-?{re.escape(version)}(?![.\dBb])"
    notice = f"{name} is licensed under the {name} Community License, {META}"
    return Terms(f"llama{version}", pattern, notice, shown, beginning)


# Gemma 4 is under Apache-2.0.
GEMMA = r"\bgemma-(1\.1-|2-|3-|3n-)?E?\d+[bBm]\b"
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
TERMS = {
    terms.license: terms
    for terms in (
        _llama("3", "Built with Meta Llama 3", "Llama 3", "Meta Llama 3"),
        *(_llama(version, "Built with Llama", "Llama", f"Llama {version}") for version in ("3.1", "3.2", "3.3")),
        Terms("gemma", GEMMA, GEMMA_NOTICE),
    )
}


def license_id(given: str, place: str) -> str:
    """Return the id of a license on the Hub; capital letters do not count.

    Args:
        given: The id as somebody wrote it.
        place: What states it, with `{}` for the id, for the message.

    Raises:
        ValueError: The Hub has no such id.
    """
    license = given.strip().lower()
    if license not in LICENSE_IDS:
        near = get_close_matches(license, LICENSE_IDS, n=1)
        hint = f": did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"{place.format(given)}: the Hub has no license of this id{hint} One without an id is {OTHER}, with its "
            "name and link."
        )
    return license


def license_of_name(name: str) -> str | None:
    """Return the license of a model whose name says what it is, such as `Llama-3.1-8B`; None for all others."""
    last = re.split(r"[/\\]", name)[-1]
    return next((terms.license for terms in TERMS.values() if re.search(terms.names, last)), None)
