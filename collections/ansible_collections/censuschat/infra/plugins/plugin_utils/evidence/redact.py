# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What of a node's words may be written down: no secrets, nothing that a terminal or a browser would act on.

The modules redact what they know to be secret. This is the second line, for file content in details and for what
somebody put where it does not belong.
"""

from __future__ import annotations

import re
from collections.abc import Collection

HIDDEN = "********"
SHORTEST = 4
"""Characters of the shortest secret value that is looked for; shorter ones would be found in every text."""
LONGEST = 2000
"""Characters of a text that are kept."""

# Every repetition has a limit or cannot begin at each character: a long text takes time in proportion.
_KEY = r"(?:passw|passphrase|secret|token|private[_-]?key|api[_-]?key|access[_-]?key|credential)[\w.\-]{0,64}+"
_PAIR = re.compile(rf"(?i)(?P<key>{_KEY}[\"']?\s{{0,8}}+[:=]\s{{0,8}}+)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;}}\]]+)")
_PEM = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL)
_URL = re.compile(r"(?P<before>://[^\s:/@]{0,200}:)[^\s@/]{1,500}(?P<after>@)")
_ALONE = re.compile(
    r"\$(?:1|2[abxy]?|5|6|7|y|gy|argon2id?|sha1)\$[./A-Za-z0-9$=,+\-]{8,}"  # crypt(5), as in /etc/shadow
    r"|grub\.pbkdf2\.[\w.]+"
    r"|\bAKIA[0-9A-Z]{16}\b"  # AWS
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"  # a JSON web token
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bxox[abprs]-[\w-]{10,}"
)
_HEADER = re.compile(r"(?i)(?P<before>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/\-]{12,}=*")
# Words that stand behind such a name as a setting and hide nothing: PasswordAuthentication: no.
_SETTINGS = frozenset(
    {"null", "none", "true", "false", "yes", "no", "on", "off", "required", "sufficient", "optional", "requisite"}
    | {"prohibit-password", "without-password", "forced-commands-only", "{", "[", "|", ">"}
)
# C0 and C1 controls, and the marks that turn the direction of text around: a page or a terminal would obey them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """The text without the given values, and without what looks like a secret or stands behind the name of one."""
    for secret in sorted((s for s in secrets if len(s) >= SHORTEST), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _PEM.sub(HIDDEN, text)
    text = _URL.sub(rf"\g<before>{HIDDEN}\g<after>", text)
    text = _ALONE.sub(HIDDEN, text)
    text = _HEADER.sub(rf"\g<before>{HIDDEN}", text)
    return _PAIR.sub(lambda m: m["key"] + (m["value"] if _harmless(m) else HIDDEN), text)


def cleaned(value: object, secrets: Collection[str] = (), longest: int = LONGEST) -> str:
    """A value as text that may be shown anywhere: redacted, without control characters, at most `longest` long."""
    text = redact("" if value is None else str(value).replace("\r\n", "\n"), secrets)
    text = printable(text).strip()
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def printable(text: str) -> str:
    """The text without control characters, each replaced by the sign for what cannot be shown."""
    return _CONTROLS.sub("\ufffd", text)


def _harmless(match: re.Match[str]) -> bool:
    """Whether it is a setting, or what is said of a file: `/etc/pam.d/common-password: pam_unix.so`."""
    plain = match["value"].strip("\"'").lower()
    word = (match.string[max(0, match.start() - 200) : match.start()].split() or [""])[-1]
    of_a_file = word.startswith("/") and not re.search(r"[?=&]", word) and "=" not in match["key"]
    return of_a_file or plain in _SETTINGS or plain.isdigit() or not plain
