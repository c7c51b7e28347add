"""TRL, asked for when a recipe runs, so that its flags can be read without it."""

from types import ModuleType

from huggingface_hub import constants

from model.messages import UserError


def import_trl() -> ModuleType:
    """Raises UserError where it, or what it needs, is not installed."""
    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would tell its makers of every run
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        import trl
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed: pip install -r requirements/trl.txt") from error
    return trl
