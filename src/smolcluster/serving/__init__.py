"""Language models that answer: the engine, the stages, and the interfaces that people's tools speak."""
