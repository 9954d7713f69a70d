"""Download of a network from the Hugging Face hub (`starseg adopt hub:OWNER/NAME`)."""

from __future__ import annotations

import re
from pathlib import Path

from starseg.errors import UserError
from starseg.models.foreign.split import require

# Settings and safetensors alone: nothing that is pickled, and no code.
_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def download(name: str) -> Path:
    """Return the folder of a model of the hub, from its cache or the network.

    Raises:
        UserError: the name has another form, or the model cannot be downloaded.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"hub:{name}: expected hub:OWNER/NAME, such as hub:nvidia/segformer-b0-finetuned-ade-512-512")
    hub = require("huggingface_hub", "transformers")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # no network, no such model, one that asks for a login: the client's own exceptions
        raise UserError(
            f"hub:{name}: cannot be downloaded ({type(error).__name__}); download it elsewhere and give the folder"
        ) from error
