"""Tasks that a model is trained on, one a module; the loop asks for all that `language.LanguageTask` has."""
