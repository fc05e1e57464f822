"""How the learning rate falls."""

import keras


def step_schedule(learning_rate, epochs, milestones):
    """A learning rate that falls to a tenth at each milestone.

    Args:
        learning_rate: float, the rate at the start.
        epochs: int, length of the run.
        milestones: floats in (0, 1), fractions of the run. None falls before the second epoch.

    Returns:
        A function of the epoch, counted from zero, for `LearningRateScheduler`, and the list of
        epochs at which the rate falls.
    """
    falls = [max(1, round(share * epochs)) for share in milestones]

    def schedule(epoch, _=None):
        return learning_rate * 0.1 ** sum(epoch >= fall for fall in falls)

    return schedule, falls


def learning_rate(recipe, steps_per_epoch):
    """The optimizer's learning rate: a number that a callback lowers, or a cosine of the steps.

    Args:
        recipe: a `Recipe`.
        steps_per_epoch: int, batches of an epoch.

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
