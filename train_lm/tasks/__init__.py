"""What a model is trained on, one task a module; `language.LanguageTask` shows what the loop asks of one."""
