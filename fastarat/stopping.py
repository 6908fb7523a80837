"""Early stopping: when a run is over before its last epoch because validation has stopped improving."""

from __future__ import annotations

from fastarat.config import Config
from fastarat.schedules import counted
from fastarat.specs import known


def over_early(config: Config, epoch: int, best_epoch: int, snapshots: int | None) -> bool:
    """Whether a run of `config`, resolved, is over after `epoch`, by `early_stop`.

    A function of what the checkpoint holds, so that a run that was killed and goes on ends where an unbroken one does.
    best_epoch: of the best checkpoint so far; 0: there is none. snapshots: that SWA has taken, None without it: it
    has to have one, or there would be no averaged network.
    """
    if config.early_stop is None or not best_epoch or epoch >= known(config.epochs) or snapshots == 0:
        return False
    # Between validations nothing is known, and a best one may be the next.
    return epoch % config.eval.every == 0 and epoch - best_epoch >= config.early_stop


def in_words(config: Config) -> str:
    """The rule, for the card; "" without one."""
    if config.early_stop is None:
        return ""
    later = ", and with SWA not before its first snapshot" if config.swa else ""
    return f"after {counted(config.early_stop, 'epoch')} without a new best on validation images{later}"


def ended(config: Config, epoch: int, best_epoch: int) -> str:
    """What happened, for the card and the screen."""
    averaged = "; SWA averages the snapshots until there" if config.swa else ""
    return f"after epoch {epoch} of {config.epochs}: the best is that of epoch {best_epoch}{averaged}"
