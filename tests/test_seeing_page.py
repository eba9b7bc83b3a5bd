"The page that shows an embedding runs from end to end in its quick profile, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('seeing')
    assert not errors
    assert all(
        o in text for o in ('synthetic-taxa', 'gradcam', 'hottest by Grad-CAM', 'kB', 'means of embeddings', 'unseen')
    )
