"""Reinforcement learning of the gates: rewards, baselines, losses."""

from dvla_fast.rl.baselines import EMABaseline, LeaveOneOutBaseline
from dvla_fast.rl.losses import ReinforceLoss, alignment_loss, total_loss
from dvla_fast.rl.rewards import (
    accuracy_reward,
    alignment_cosine,
    episode_accuracy,
    layer_rewards,
    reward_parts,
    similarity_reward,
)

__all__ = [
    "EMABaseline",
    "LeaveOneOutBaseline",
    "ReinforceLoss",
    "accuracy_reward",
    "alignment_cosine",
    "alignment_loss",
    "episode_accuracy",
    "layer_rewards",
    "reward_parts",
    "similarity_reward",
    "total_loss",
]
