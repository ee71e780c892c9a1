"""The model's own answers to a task's training questions, from before the task."""

from __future__ import annotations

from llava_keeplora.errors import MethodError
from llava_keeplora.models import Inputs
from llava_keeplora.run_folder import OWN_ANSWERS
from llava_keeplora.sequence.data import SomeImages
from llava_keeplora.sequence.method_state import MethodState
from llava_keeplora_eval import predict_to_file
from llava_keeplora_eval.predictions import join_shards, read_predictions


def own_answers(state: MethodState, index: int) -> Inputs:
    """Return a task's training questions with the model's own answers; those that are missing are written.

    Questions with an empty answer are left out. Every process must call this.

    Args:
        state: the method's state; the model has the weights from before the task, or every answer is there.
        index: the task.

    Raises:
        MethodError: if no answer has a text.
    """
    context, data, path = state.context, state.tasks[index - 1].train, state.path(index, OWN_ANSWERS)
    images = context.cache.split(data)
    # The main process alone leaves the joined file behind, so that all of them see the same.
    if missing := len(data) - len(read_predictions(path, data)):
        with context.zero.engaged(context.family.model):
            predict_to_file(
                context.family.predictor(data.recipe, images),
                data,
                path,
                batch_size=context.config.evaluation.batch_size,
                advance=lambda count: context.progress.advance(
                    context.family.eval_cost * context.world * count
                ),
                shard=(context.rank, context.world),
                rounds=context.most if context.zero.partitions else None,
            )
        context.barrier()
        if context.rank == 0:
            join_shards(path, data)
            state.passes["answer"] += missing
        context.barrier()
    texts = read_predictions(path, data)
    rows = [row for row, example in enumerate(data.ids) if texts[example].strip()]
    if not rows:
        raise MethodError(
            f"the model's own answers to the training questions of task '{data.recipe.name}' are all empty, "
            "and there is nothing to distil",
            "check the model with `llava-keeplora-eval predict`, or choose lwf",
        )
    answered = data.take(rows).with_answers([texts[data.ids[row]] for row in rows])
    return context.family.inputs(answered, SomeImages(images, rows))
