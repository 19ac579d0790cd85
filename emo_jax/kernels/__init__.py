"""How is it fast? One folder an operation: the public function, its plain oracle, its formulations."""
