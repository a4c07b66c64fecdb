"""Settings that most runs do without: people in the detokenizer, break conditions, whole bodies from faces."""

from typing import Annotated

from pydantic import Field, model_validator

from nmlib.settings import Count, OptimConfig, Settings


class TuningConfig(Settings):
    """The detokenizer fine-tuned on people: on `faces`, then on what the model of `stage` predicts (`predicted`).

    The predictions are of fresh conversations of the people data set `data`.
    """

    stage: str
    data: str
    faces: OptimConfig
    predicted: OptimConfig


class ModelSize(Settings):
    """A model's width and depth, where the rest of its settings stays."""

    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count


class BreaksConfig(Settings):
    """Where token caching and rollback supervision stop being worth it (paper: break conditions).

    The detokenizer's training is stopped after each of `detokenizer_steps` and compared, over `drift_rounds` rounds,
    with the trained one. Models of `sizes` learn the words of the stages `markov` and `rollback` for `word_steps` steps
    of `word_rounds` rounds. The trained stages are asked for a picture `depth` rounds before the last one in
    conversations of each of `rounds` rounds. `conversations` is how many are asked each time.
    """

    detokenizer_steps: Annotated[tuple[Count, ...], Field(min_length=1)]
    drift_rounds: Annotated[int, Field(ge=3, le=64)]
    sizes: Annotated[tuple[ModelSize, ...], Field(min_length=1)]
    word_steps: Count
    word_rounds: Count
    rounds: Annotated[tuple[Annotated[int, Field(ge=3, le=64)], ...], Field(min_length=1)]
    conversations: Count
    depth: Count = 1

    @model_validator(mode="after")
    def _lengths_have_room(self) -> "BreaksConfig":
        if min(self.rounds) < self.depth + 2:
            raise ValueError(f"rounds {min(self.rounds)}: going back {self.depth} needs {self.depth + 2} or more")
        return self


class FullBodyConfig(Settings):
    """Pictures of a whole person made from a face by a diffusion pipeline, and which of them are kept.

    Args:
        image_size: pixels a side of what the pipeline is asked for.
        prompts: what it is asked for, one drawn for each picture.
        attempts: pictures made for one face at most, until one is kept.
        min_similarity: least cosine between the face given and the face made. The default is for dlib's network, where
            two photographs of one person have about 0.96 and of two persons about 0.83.
        min_face: pixels of the shorter side of a face below which it cannot be compared.
        max_face_share: largest height of the face as a share of the picture's; a larger one shows no whole body.
        arguments: more arguments of the pipeline, by its own names, for example `num_inference_steps`.
    """

    image_size: Annotated[int, Field(ge=16, le=2048)] = 1024
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "a full body photograph of the same person standing, from head to toe",
        "a full body photograph of the same person walking in a street",
    )
    attempts: Count = 4
    min_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.92
    min_face: Annotated[int, Field(ge=8)] = 64
    max_face_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    arguments: dict[str, int | float | str] = Field(default_factory=dict)
