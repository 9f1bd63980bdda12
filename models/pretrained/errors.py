"""What is wrong with a folder or a network, told in one line."""

from configs.errors import UserError


class PretrainedError(UserError, ValueError):
    """A pretrained folder that cannot be read or written; names the file and the tensor or field."""


class UnsuitedError(PretrainedError):
    """A network that no checkpoint of some family can hold; the text is the reason."""
