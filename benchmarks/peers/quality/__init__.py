"""Quality beside other libraries: the same layers of the same models, rounded by each, at equal bytes."""
