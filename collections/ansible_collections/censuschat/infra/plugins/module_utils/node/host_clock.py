# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether the kernel's clock is disciplined, asked of the kernel itself."""

from __future__ import annotations

import ctypes

# adjtimex(2): the return value while the clock is not synchronised.
TIME_ERROR = 5
# struct timex is 208 bytes on 64-bit Linux; its first field, modes, is 0 for a question.
_TIMEX_BYTES = 256


def synchronised() -> bool:
    """True when some time service keeps the kernel's clock, whichever it is."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    return 0 <= int(ctypes.CDLL(None).adjtimex(buffer)) < TIME_ERROR
