"""What a person looks at: where in a picture a decision is made, who is near whom, and where answers stop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        'maps': [
            'Explainer',
            'METHODS',
            'class_prototypes',
            'to_picture',
            'toward_node',
            'toward_vector',
            'unit_rows',
        ],
        'map_plots': ['plot_heat', 'path_maps', 'plot_path', 'short_name', 'sanity_check'],
        'layouts': ['umap_layout', 'embedding_map', 'plot_neighbours'],
        'embedding_plots': [
            'pair_distances',
            'overlap',
            'plot_densities',
            'prototype_linkage',
            'cophenetic_correlation',
            'plot_tanglegram',
        ],
        'slider': ['ConfidenceSteps', 'confidence_steps', 'confidence_slider'],
    },
)
