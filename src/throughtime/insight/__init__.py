"""How far the signal reaches, in numbers; `report` draws them and puts them into words."""
