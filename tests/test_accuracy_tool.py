"""tools/accuracy.py's own arithmetic. Oracle: means by hand."""

from __future__ import annotations

import accuracy


def test_means_over_seeds_by_hand():
    def row(recipe, seed, top1, model='vit_t'):
        return accuracy.Row(model, 'mmpretrain', recipe, seed, 400, top1, 0, 0.0)

    rows = [row('float', 0, 82.0), *(row('w4a4', s, t) for s, t in enumerate((75.0, 76.0, 77.0)))]
    rows += [row('float', 0, 79.0, 'deit_t'), *(row('w4a4', s, 78.5, 'deit_t') for s in range(3))]
    table = accuracy.means_table(rows)
    columns = [list(column.cells) for column in table.columns]
    assert [c[0] for c in columns] == [
        'vit_t', 'mmpretrain', 'w4a4', '3', '76.00', '0.58', '-6.00', '75.00', '77.00',
    ]  # fmt: skip
    assert [c[1] for c in columns][4:7] == ['78.50', '0.00', '-0.50']


def test_means_of_engines_differences_by_hand():
    def row(engine, seed, simulated, top1):
        return accuracy.EngineRow('vit_t', '8/8/4', seed, engine, 400, simulated, top1, 99.0, False)

    rows = [row('native', 0, 80.0, 80.0), row('native', 1, 81.0, 81.0)]
    rows += [row('ort-qdq', 0, 80.0, 81.0), row('ort-qdq', 1, 81.0, 79.0)]
    columns = [list(column.cells) for column in accuracy.engine_means_table(rows).columns]
    assert [c[0] for c in columns] == ['vit_t', '8/8/4', 'native', '2', '+0.00', '0.00', '+0.00', '+0.00']
    assert [c[1] for c in columns][2:] == ['ort-qdq', '2', '-0.50', '1.50', '-2.00', '+1.00']


def test_a_missing_folder_is_named_before_anything_is_read(tmp_path, capsys):
    missing = tmp_path / 'no'
    assert accuracy.main([str(tmp_path), '--json', str(missing / 'a.json')]) == 2
    assert f'there is no folder {missing}' in capsys.readouterr().err
