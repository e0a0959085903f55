"""The foundation of all other packages; of this project it imports `checks` alone."""
