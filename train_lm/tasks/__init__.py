"""Tasks that a model is trained on, one a module; what a task must have is what `language.LanguageTask` has."""
