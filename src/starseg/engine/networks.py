"""The network with which step 0 of a run starts."""

from __future__ import annotations

from starseg.config import ModelConfig
from starseg.engine.checkpoint import load_info, load_model
from starseg.methods import Method
from starseg.models import Architecture, Segmenter, make_network


def run_architecture(config: ModelConfig, method: Method) -> Architecture:
    """Return the architecture of a run's network.

    Raises:
        UserError: ``frozen_from`` is not the directory of a finished step.
    """
    if config.frozen_from is not None:
        return load_info(config.frozen_from).architecture
    return method.architecture(Architecture.of(config))


def first_network(config: ModelConfig, method: Method, classes: int) -> Segmenter:
    """Build the network of step 0, with the encoder and decoder of ``frozen_from`` if it is given.

    Args:
        config: section ``model`` of the configuration.
        method: the method that trains the network.
        classes: number of classes of step 0.

    Raises:
        UserError: ``frozen_from`` is not the directory of a finished step, or its weights are damaged.
    """
    architecture = run_architecture(config, method)
    if config.frozen_from is None:
        return make_network(architecture, [classes], method.layout, config.pretrained)
    model, source = make_network(architecture, [classes], method.layout), load_model(config.frozen_from)[0]
    model.encoder.load_state_dict(source.encoder.state_dict())
    model.decoder.load_state_dict(source.decoder.state_dict())
    return model
