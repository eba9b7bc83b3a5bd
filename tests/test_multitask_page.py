"The page about shared and specific embeddings runs from end to end in its quick profile, on organisms drawn on the spot."

def test_quick_profile(quick_page):
    text, errors = quick_page('multitask')
    assert all(o in text for o in ('synthetic-taxa', 'softmax', 'SNDL', 'DiVA', 'divide and conquer', 'recall@1', 'MAP@R', 'NMI', 'unseen'))
    assert not errors
