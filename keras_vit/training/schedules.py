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


@keras.saving.register_keras_serializable("keras_vit")
class LaterCosineDecay(keras.optimizers.schedules.CosineDecay):
    """A cosine schedule that begins after the first steps of the optimizer.

    Args:
        *args, **kwargs: those of `keras.optimizers.schedules.CosineDecay`.
        start: int, number of steps before it.
    """

    def __init__(self, *args, start=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = start

    def __call__(self, step):
        return super().__call__(step - self.start)

    def get_config(self):
        return {**super().get_config(), "start": self.start}


def learning_rate(recipe, steps_per_epoch, start=0):
    """The optimizer's learning rate: a float that a callback updates, or a cosine schedule.

    Args:
        recipe: a `Recipe`.
        steps_per_epoch: int, number of batches in an epoch.
        start: int, number of steps that the optimizer has taken before the first epoch.

    Returns:
        Float, or a Keras `LearningRateSchedule`.
    """
    if recipe.schedule == "milestones":
        return recipe.learning_rate
    steps = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup * steps), steps - 1)
    rising = {"warmup_target": recipe.learning_rate, "warmup_steps": warmup} if warmup else {}
    first = 0.0 if warmup else recipe.learning_rate
    if start:
        return LaterCosineDecay(first, steps - warmup, **rising, start=start)
    return keras.optimizers.schedules.CosineDecay(first, steps - warmup, **rising)
