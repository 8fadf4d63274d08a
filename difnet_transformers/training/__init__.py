"""Training: cross-entropy and self-critical trainers, their configuration, and their losses as pure functions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "advantages": ["scst_advantages"],
        "checkpoint": ["Progress"],
        "config": ["TrainingConfig"],
        "decoding": ["decode_for_scst"],
        "logging": ["TrainingFailed"],
        "losses": [
            "SequenceLogProbs",
            "cross_entropy_loss",
            "encode_images",
            "self_critical_loss",
            "xe_sequences",
        ],
        "optimization": ["learning_rate", "make_optimizer"],
        "rewards": ["caption_rewards"],
        "self_critical_stage": ["DifnetSelfCriticalTrainer"],
        "trainer": ["DifnetTrainer", "TrainingStopped"],
    },
)
