"Hierarchical deep metric learning on images; a dozen names, each loaded when it is asked for."

import lazy_loader

__version__ = "0.0.1"
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=['trees', 'images', 'heads', 'judging', 'similarity', 'running', 'seeing'],
    submod_attrs={
        'trees': ['Taxonomy'],
        'images': ['extract', 'load_dataset'],
        'heads': ['create_head'],
        'judging': ['TemperatureScaling', 'create_rule', 'evaluate'],
        'similarity': ['Index'],
        'running': ['Predictor', 'compare', 'fit', 'load_run'],
    },
)
