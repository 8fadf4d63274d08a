"""Training: cross-entropy and self-critical trainers, their configuration, and their losses as pure functions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "advantages": ["scst_advantages", "scst_baseline"],
        "checkpoint": ["Progress"],
        "config": ["TrainingConfig", "parse_rewards"],
        "decoding": ["decode_for_scst"],
        "encoder_decoder": ["encode_images"],
        "logging": ["TrainingFailed"],
        "losses": [
            "SequenceLogProbs",
            "cross_entropy_loss",
            "self_critical_loss",
            "xe_sequences",
        ],
        "optimization": ["learning_rate", "make_optimizer"],
        "regularization": ["kl_to_reference"],
        "rewards": [
            "RewardFailed",
            "Rewards",
            "WeightedRewards",
            "caption_rewards",
            "load_reward",
            "load_rewards",
            "score_sequences",
        ],
        "self_critical_config": ["SelfCriticalConfig"],
        "self_critical_stage": ["DifnetSelfCriticalTrainer"],
        "self_critical_collator": ["SelfCriticalCollator"],
        "self_critical_trainer": ["SelfCriticalTrainer"],
        "trainer": ["DifnetTrainer", "TrainingStopped"],
    },
)
