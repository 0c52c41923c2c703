"""A look at the Hugging Face Hub before anything is read from it, so that a missing network is no wait.

Its client tries for minutes; one short request tells whether to begin at all.
"""

import os
from typing import Literal

from vlmpack.errors import SourceError

_TIMEOUT_S = 5.0


def check_hub(kind: Literal["dataset", "model"], name: str) -> None:
    """Make sure that the Hub can be reached and has this repository. A few seconds at most.

    Args:
        kind: What the repository holds.
        name: Such as "HuggingFaceM4/the_cauldron".

    Raises:
        SourceError: If not; says why.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        raise SourceError(
            f"{name} is no local path, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to ask the Hugging "
            "Face Hub; unset it, or give a local path"
        )
    timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _TIMEOUT_S
    api = HfApi()
    try:
        (api.dataset_info if kind == "dataset" else api.model_info)(name, timeout=timeout)
    except Exception as error:  # the client's own errors and those of whatever HTTP library it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"the {kind} {name!r} is no local path and cannot be had from {api.endpoint} ({reason}). Check "
            "the name, the network, and `hf auth login` if it is private."
        ) from error
