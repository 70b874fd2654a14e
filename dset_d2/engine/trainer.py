"""Detectron2's trainers with an early end."""

import logging
import math

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import Tensor

logger = logging.getLogger(__name__)


class _OurTrainer:
    """Adds :meth:`stop_early` to a Detectron2 trainer, and keeps a resumed run's own settings."""

    stopped = False

    def stop_early(self) -> None:
        """End training after the present step as if it were the last one."""
        self.stopped = True

    def train(self, start_iter: int, max_iter: int) -> None:
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.stopped:
                        break
                else:
                    self.iter += 1
            finally:
                self.after_train()

    def load_state_dict(self, state: dict) -> None:
        """The optimizer's moments come back; its settings stay the config's, as all others do.

        Loading would bring back rates and decay, against what ``--resume optimizer.lr=...`` says.
        """
        groups = self.optimizer.param_groups
        saved = len(state["optimizer"]["param_groups"])
        if saved != len(groups):
            raise ValueError(
                f"the checkpoint's optimizer has {saved} groups of parameters with equal rates and "
                f"decay, the config's {len(groups)}: a resumed run can change these, but not merge "
                "or split the groups"
            )
        own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        super().load_state_dict(state)
        changed = set()
        for group, settings in zip(self.optimizer.param_groups, own):
            settings["initial_lr"] = settings["lr"]  # which schedules multiply
            for key in ("initial_lr", "weight_decay", "betas"):
                if key in settings and group.get(key) != settings[key]:
                    changed.add(f"{key} {group.get(key)} -> {settings[key]}")
            group.update(settings)
        if changed:
            logger.warning("The config changes the optimizer: %s", ", ".join(sorted(changed)))

    def _write_metrics(self, loss_dict: dict[str, Tensor], *args, **kwargs) -> None:
        try:
            super()._write_metrics(loss_dict, *args, **kwargs)
        except FloatingPointError:
            bad = {k: v.item() for k, v in loss_dict.items() if not math.isfinite(v.item())}
            where = "" if bad else " on another process"
            message = f"training stops at iteration {self.iter}: losses not finite{where}: {bad}"
            raise FloatingPointError(message) from None


class Trainer(_OurTrainer, SimpleTrainer):
    pass


class MixedPrecisionTrainer(_OurTrainer, AMPTrainer):
    """Half precision with scaled gradients; needs a GPU."""


class BFloat16Trainer(_OurTrainer, SimpleTrainer):
    """bfloat16 autocast, which needs no scaling; runs on CPUs, too."""

    def run_step(self) -> None:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            super().run_step()


def trainer_class(amp: bool, device: str) -> type[SimpleTrainer]:
    """The trainer for a precision and a device."""
    if not amp:
        return Trainer
    return MixedPrecisionTrainer if torch.device(device).type == "cuda" else BFloat16Trainer
