"""No image at all: the control of every table."""

from dit_booth.strategy import Strategy, register


@register("none")
class NoImage(Strategy):
    """No image: the text-only control."""

    identity_at_init = True
    reads_image = False
    excludes = ("*",)
