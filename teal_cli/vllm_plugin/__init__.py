"""A plugin of vLLM: `vllm serve FOLDER` runs a TEAL checkpoint.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`).
"""

import logging

LOGGER = "vllm.teal"
"""Below vLLM's own, whose lines are shown."""


def register() -> None:
    """Tell vLLM of the quantisation method that a TEAL checkpoint names. Again does no harm.

    A vLLM that has what is needed elsewhere must still run all other models.
    """
    try:
        from teal_cli.vllm_plugin import method  # noqa: F401  (imports vLLM, and registers)
    except ImportError as error:
        logging.getLogger(LOGGER).warning("TEAL checkpoints cannot be served by this vLLM: %s", error)
