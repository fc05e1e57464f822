"""Learning rate schedules."""

import keras


def step_schedule(learning_rate, epochs, milestones):
    """A learning rate that drops by a factor of 10 at each milestone.

    Args:
        learning_rate: float, initial learning rate.
        epochs: int, total number of epochs.
        milestones: floats in (0, 1), fractions of the run. The rate never drops in the first epoch.

    Returns:
        A function of the epoch, counted from zero, for `LearningRateScheduler`, and the list of
        epochs at which the rate drops.
    """
    drops = [max(1, round(milestone * epochs)) for milestone in milestones]

    def schedule(epoch, _=None):
        return learning_rate * 0.1 ** sum(epoch >= drop for drop in drops)

    return schedule, drops


def learning_rate(recipe, steps_per_epoch):
    """The optimizer's learning rate: a float that a callback updates, or a cosine schedule.

    Args:
        recipe: a `Recipe`.
        steps_per_epoch: int, number of batches in an epoch.

    Returns:
        Float, or a Keras `LearningRateSchedule`.
    """
    if recipe.schedule == "milestones":
        return recipe.learning_rate
    steps = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup * steps), steps - 1)
    start = {"warmup_target": recipe.learning_rate, "warmup_steps": warmup} if warmup else {}
    first = 0.0 if warmup else recipe.learning_rate
    return keras.optimizers.schedules.CosineDecay(first, steps - warmup, **start)
