"""Checks of a card's metadata by the rules of the Hub, before anything is built or uploaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# The ids in the documentation of the Hub; any other license is `other` with its name and link.
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)
# ISO 639-1. The thousands of three-letter codes (ISO 639-3) are only checked by their form.
LANGUAGES = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el
    en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu
    ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na
    nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn
    so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    code multilingual
    """.split()  # noqa: SIM905
)


def check_metadata(data: Mapping[str, Any], subject: object = "the card") -> None:
    """Check license, languages and Hub ids in the front matter of a card, which `subject` names in the message.

    Raises:
        ValueError: The Hub would reject some of them; the message names all problems and their corrections.
    """
    problems = [problem for value in as_list(data.get("license")) if (problem := _license_problem(value, data))]
    problems += [problem for value in as_list(data.get("language")) if (problem := _language_problem(value))]
    problems += [
        f"{key} {value!r} is not a Hub id (OWNER/NAME)"
        for key in ("datasets", "base_model")
        for value in as_list(data.get(key))
        if not _is_repo_id(value)
    ]
    if problems:
        raise ValueError(f"the Hub would reject the metadata of {subject}: {'; '.join(problems)}.")


def as_list(value: Any) -> list[Any]:
    """The values of a field that may be a single value, a list or absent."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _license_problem(value: Any, data: Mapping[str, Any]) -> str | None:
    if value not in LICENSES:
        near = difflib.get_close_matches(str(value).lower(), sorted(LICENSES), n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        return (
            f"license {value!r} is not a license id of the Hub{guess}; use 'other' with license_name and license_link"
        )
    missing = [key for key in ("license_name", "license_link") if not data.get(key)]
    if value == "other" and missing:
        return f"license 'other' needs {' and '.join(missing)}"
    return None


def _language_problem(value: Any) -> str | None:
    # PyYAML reads the code of Norwegian, `no`, as false.
    code = "no" if value is False else str(value)
    if code in LANGUAGES or re.fullmatch(r"[a-z]{3}", code):
        return None
    return f"language {code!r} is not an ISO 639 code such as en, de or yue (BCP 47 tags belong in language_bcp47)"


def _is_repo_id(value: Any) -> bool:
    try:
        validate_repo_id(str(value))
    except HFValidationError:
        return False
    return True
