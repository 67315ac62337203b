"""Keep one notice of bitsandbytes out of the user's terminal.

On CPUs with AVX512-BF16, importing bitsandbytes logs that an optional inference kernel is missing. That
kernel needs the repacked weights which :func:`qsvft.storage.quantization.disable_cpu_repacking` switches off, so
here the notice concerns nobody. Everything else that bitsandbytes logs is left alone.
"""

import logging

_NOTICE = "Failed to load CPU gemm_4bit_forward"


def _concerns_someone(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOTICE)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_someone)
