//! Where a driver keeps the elements of a fragment: which lane has which, and in which order.

use std::fmt;

/// Bits of the number of a lane, and of the number of a component, that a layout may have: subgroups of up to 128 lanes, fragments of up
/// to 256 elements.
const BITS: usize = 8;

/// The row and the column that the bits of a number add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Places {
    rows: [u8; BITS],
    columns: [u8; BITS],
}

impl Places {
    /// The row and the column of a number.
    fn of(&self, number: u32) -> [u32; 2] {
        let sum = |places: &[u8; BITS]| {
            (0..BITS).filter(|bit| number >> bit & 1 == 1).map(|bit| u32::from(places[bit])).sum()
        };
        [sum(&self.rows), sum(&self.columns)]
    }
}

/// The layout of a fragment's elements in the registers of a subgroup, as a driver has it: each lane has the same number of components, and
/// each bit of the lane's number, and of the component's, adds to the row or to the column of the element.
///
/// Accumulators (f32) and left operands (f16) have the same layout, so that results become an operand without leaving their lanes. No
/// specification says which: the device is probed for it. Right operands may have the layout of the transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ElementLayout {
    lane: Places,
    component: Places,
    /// Lanes of a subgroup.
    lanes: u32,
    /// Components of a lane.
    components: u32,
    /// Right operands have each element where left operands have it of the transpose. Else it is not known where they have it.
    transposes_right: bool,
}

/// How lanes and components share the rows or the columns of a right operand. A row, or a column, belongs to the lanes of a part, and has
/// the same rank in each of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shares {
    /// The first place of a lane as an expression of WGSL.
    pub(crate) first: String,
    /// The other places by their ranks, from the first on, ascending.
    pub(crate) offsets: Vec<u32>,
    /// The rank of each component.
    pub(crate) ranks: Vec<usize>,
    /// Parts, and the part of a lane as an expression of WGSL.
    pub(crate) parts: u32,
    pub(crate) part: String,
    /// Part and rank of `place` as expressions of WGSL.
    pub(crate) part_of_place: String,
    pub(crate) rank_of_place: String,
}

/// The sum of `1 << n`, for each n-th number, where `of` a bit is set.
fn packed(bits: impl IntoIterator<Item = String>) -> String {
    let terms: Vec<String> =
        bits.into_iter().enumerate().map(|(n, bit)| if n == 0 { bit } else { format!("({bit} << {n}u)") }).collect();
    if terms.is_empty() { "0u".into() } else { terms.join(" + ") }
}

impl ElementLayout {
    /// The layout of NVIDIA's driver for 16x16 and 32 lanes: component i of lane 4 g + t is in row g + 8 (i / 4 % 2) and in column
    /// 2 t + i % 2 + 8 (i / 2 % 2).
    pub const NVIDIA: ElementLayout = ElementLayout {
        lane: Places { rows: [0, 0, 1, 2, 4, 0, 0, 0], columns: [2, 4, 0, 0, 0, 0, 0, 0] },
        component: Places { rows: [0, 0, 8, 0, 0, 0, 0, 0], columns: [1, 8, 0, 0, 0, 0, 0, 0] },
        lanes: 32,
        components: 8,
        transposes_right: true,
    };

    /// The layout of Mesa's llvmpipe for 8x8 and 8 lanes: a component is a row, and a lane is a column.
    pub const LLVMPIPE: ElementLayout = ElementLayout {
        lane: Places { rows: [0; BITS], columns: [1, 2, 4, 0, 0, 0, 0, 0] },
        component: Places { rows: [1, 2, 4, 0, 0, 0, 0, 0], columns: [0; BITS] },
        lanes: 8,
        components: 8,
        transposes_right: true,
    };

    /// The layout in which component `i` of lane `l` is the element `elements[l * components + i]` of a fragment, row by row.
    ///
    /// # Errors
    /// The reason, in words, where the kernels cannot use it.
    pub fn new(side: u32, lanes: u32, elements: &[u32]) -> Result<Self, String> {
        let area = side * side;
        let components = area.checked_div(lanes).unwrap_or(0);
        if elements.len() as u32 != area || components * lanes != area {
            return Err(format!("{lanes} lanes do not share {side}x{side} elements evenly"));
        }
        if !lanes.is_power_of_two() || !components.is_power_of_two() || lanes > 128 || components > 128 {
            return Err(format!("{lanes} lanes with {components} elements each are no powers of two up to 128"));
        }
        let place = |lane: u32, component: u32| {
            let element = elements[(lane * components + component) as usize];
            [element / side, element % side]
        };
        if place(0, 0) != [0, 0] {
            return Err(format!("the first component of the first lane is the element {:?}", place(0, 0)));
        }
        let places = |count: u32, of: &dyn Fn(u32) -> [u32; 2]| {
            let mut places = Places::default();
            for bit in 0..count.trailing_zeros() as usize {
                let [row, column] = of(1 << bit);
                (places.rows[bit], places.columns[bit]) = (row as u8, column as u8);
            }
            places
        };
        let layout = ElementLayout {
            lane: places(lanes, &|lane| place(lane, 0)),
            component: places(components, &|component| place(0, component)),
            lanes,
            components,
            transposes_right: false,
        };
        let both = |places: &Places| (0..BITS).any(|bit| places.rows[bit] > 0 && places.columns[bit] > 0);
        if both(&layout.lane) || both(&layout.component) {
            return Err("a bit of the number of a lane or a component adds to the row and to the column".into());
        }
        let mut seen = vec![false; area as usize];
        for (lane, component) in (0..lanes).flat_map(|lane| (0..components).map(move |component| (lane, component))) {
            let [row, column] = layout.place(lane, component);
            let found = place(lane, component);
            if [row, column] != found {
                return Err(format!(
                    "component {component} of lane {lane} is the element {found:?}, where {:?} follows from the others",
                    [row, column]
                ));
            }
            seen[(row * side + column) as usize] = true;
        }
        if !seen.iter().all(|seen| *seen) {
            return Err("some elements are in two lanes, and others in none".into());
        }
        let columns = layout.columns().len();
        if ![1, 2, 4].contains(&columns) {
            return Err(format!("a lane has {columns} elements of a row, and the kernels take 1, 2 or 4"));
        }
        Ok(layout)
    }

    /// With the layout of right operands. A right operand was made of the components of a fragment whose elements are numbered row by row,
    /// and `elements` are those that it had then.
    #[must_use]
    pub fn with_right(self, side: u32, elements: &[u32]) -> Self {
        let transpose = (0..side).flat_map(|row| (0..side).map(move |column| column * side + row));
        ElementLayout { transposes_right: transpose.eq(elements.iter().copied()), ..self }
    }

    /// How lanes and components share the rows (0) or the columns (1) of right operands, where their layout is known.
    pub(crate) fn right_shares(&self, axis: usize) -> Option<Shares> {
        if !self.transposes_right {
            return None;
        }
        let axis = 1 - axis;
        let places = |places: &Places| if axis == 0 { places.rows } else { places.columns };
        // Bits of a number that add to the place, by what they add.
        let bits = |of: &Places| {
            let places = places(of);
            let mut bits: Vec<(u32, usize)> =
                (0..BITS).filter(|bit| places[*bit] > 0).map(|bit| (u32::from(places[bit]), bit)).collect();
            bits.sort_unstable();
            bits
        };
        let (lane_bits, component_bits) = (bits(&self.lane), bits(&self.component));
        let of_place = |bits: &[(u32, usize)]| packed(bits.iter().map(|(adds, _)| format!("(place / {adds}u % 2u)")));
        let offsets = self.distinct(axis);
        let rank = |component: u32| {
            let offset = self.component.of(component)[axis];
            offsets.iter().position(|found| *found == offset).unwrap_or_default()
        };
        Some(Shares {
            first: self.expression(axis),
            ranks: (0..self.components).map(rank).collect(),
            parts: 1 << lane_bits.len(),
            part: packed(lane_bits.iter().map(|(_, bit)| format!("((lane >> {bit}u) & 1u)"))),
            part_of_place: of_place(&lane_bits),
            rank_of_place: of_place(&component_bits),
            offsets,
        })
    }

    /// Row and column of a component of a lane.
    pub fn place(&self, lane: u32, component: u32) -> [u32; 2] {
        let [row, column] = self.lane.of(lane);
        let [rows, columns] = self.component.of(component);
        [row + rows, column + columns]
    }

    /// Components of a lane.
    pub(crate) fn components(&self) -> u32 {
        self.components
    }

    /// The different rows, or columns, of a lane's components, ascending.
    fn distinct(&self, axis: usize) -> Vec<u32> {
        let mut found: Vec<u32> = (0..self.components).map(|i| self.component.of(i)[axis]).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Rows of a lane's components, from its first one on, ascending.
    pub(crate) fn rows(&self) -> Vec<u32> {
        self.distinct(0)
    }

    /// Columns of a lane's components, from its first one on, ascending.
    pub(crate) fn columns(&self) -> Vec<u32> {
        self.distinct(1)
    }

    /// The component in the n-th of the [`rows`](Self::rows) and the m-th of the [`columns`](Self::columns).
    pub(crate) fn component(&self, row: usize, column: usize) -> u32 {
        let wanted = [self.rows()[row], self.columns()[column]];
        (0..self.components).find(|i| self.component.of(*i) == wanted).unwrap_or_default()
    }

    /// Bits of the lane's number that tell lanes of a row apart, each as a number.
    pub(crate) fn row_lanes(&self) -> Vec<u32> {
        let bits = 0..self.lanes.trailing_zeros() as usize;
        bits.filter(|bit| self.lane.columns[*bit] > 0).map(|bit| 1 << bit).collect()
    }

    /// The row, or the column, of a lane's first element as an expression of WGSL.
    pub(crate) fn expression(&self, axis: usize) -> String {
        let places = if axis == 0 { self.lane.rows } else { self.lane.columns };
        sum_of_bits("lane", &places.map(u32::from))
    }

    /// The first of a lane's columns of a tile, where each lane has four neighbours, as an expression of WGSL.
    pub(crate) fn quad_expression(&self) -> String {
        let mut places = [0; BITS];
        let (mut bits, mut place) = (self.lane.columns.iter().enumerate().collect::<Vec<_>>(), 4);
        bits.sort_unstable_by_key(|(_, column)| **column);
        for (bit, _) in bits.into_iter().filter(|(_, column)| **column > 0) {
            places[bit] = place;
            place *= 2;
        }
        sum_of_bits("lane", &places)
    }

    /// The columns of a tile that the bits of a place in the stage add up to, so that a lane has four neighbours: its elements are the lowest
    /// bits of a column, and lanes the next ones. Places are the columns of neighbouring fragments of `side`. Further bits are as they are.
    fn columns_of_bits(&self, side: u32) -> Vec<u32> {
        let of_bits = |places: &[u8; BITS]| {
            let mut found: Vec<u32> = places.iter().map(|place| u32::from(*place)).filter(|place| *place > 0).collect();
            found.sort_unstable();
            found
        };
        let own = of_bits(&self.component.columns);
        let fragments = (0..2 - own.len() as u32).map(|bit| side << bit);
        let places: Vec<u32> = own.iter().copied().chain(fragments).chain(of_bits(&self.lane.columns)).collect();
        let column = |bit: usize| places.iter().position(|place| *place == 1 << bit).map_or(0, |bit| 1 << bit);
        (0..places.len()).map(column).collect()
    }

    /// The column of the tile at a place of the stage ([`columns_of_bits`](Self::columns_of_bits)).
    pub(crate) fn column_at(&self, side: u32, place: u32) -> u32 {
        let columns = self.columns_of_bits(side);
        let low: u32 = columns.iter().enumerate().map(|(bit, column)| (place >> bit & 1) * column).sum();
        low + (place >> columns.len() << columns.len())
    }

    /// The same as an expression of WGSL, of a place below `end`, a power of two, or of any.
    pub(crate) fn column_at_expression(&self, side: u32, place: &str, end: Option<u32>) -> String {
        let mut columns = self.columns_of_bits(side);
        let moved = 1 << columns.len();
        if let Some(end) = end {
            columns.truncate(end.trailing_zeros() as usize);
        }
        let low = sum_of_bits(place, &columns);
        if end.is_some_and(|end| end <= moved) { low } else { format!("{place} / {moved}u * {moved}u + {low}") }
    }
}

/// The sum of the places of a number's bits, as an expression of WGSL.
fn sum_of_bits(number: &str, places: &[u32]) -> String {
    let mut terms = Vec::new();
    let mut bit = 0;
    while bit < places.len() {
        let (first, place) = (bit, places[bit]);
        bit += 1;
        if place == 0 {
            continue;
        }
        while bit < places.len() && places[bit] == place << (bit - first) {
            bit += 1;
        }
        terms.push(format!("({number} >> {first}u) % {}u * {place}u", 1u32 << (bit - first)));
    }
    if terms.is_empty() { "0u".into() } else { terms.join(" + ") }
}

impl fmt::Display for ElementLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rows, columns) = (self.rows().len(), self.columns().len());
        write!(f, "{rows} rows of {columns} elements in each of {} lanes", self.lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(layout: ElementLayout, side: u32) -> Vec<u32> {
        let all = (0..layout.lanes).flat_map(|lane| (0..layout.components).map(move |i| (lane, i)));
        all.map(|(lane, i)| layout.place(lane, i)).map(|[row, column]| row * side + column).collect()
    }

    #[test]
    fn layouts_from_their_elements() {
        for (side, layout) in [(16, ElementLayout::NVIDIA), (8, ElementLayout::LLVMPIPE)] {
            let found = elements(layout, side);
            let right: Vec<u32> = (0..side * side).map(|n| n % side * side + n / side).collect();
            let new = ElementLayout::new(side, layout.lanes, &found).unwrap();
            assert_eq!(new.with_right(side, &right), layout);
            let straight: Vec<u32> = (0..side * side).collect();
            assert_eq!(new.with_right(side, &straight), new);
            assert_eq!(new.right_shares(0), None);
            let mut sorted = found.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..side * side));
        }
        let nvidia = ElementLayout::NVIDIA;
        assert_eq!((nvidia.rows(), nvidia.columns()), (vec![0, 8], vec![0, 1, 8, 9]));
        assert_eq!([nvidia.component(0, 2), nvidia.component(1, 1)], [2, 5]);
        assert_eq!(nvidia.row_lanes(), [1, 2]);
        assert_eq!(nvidia.expression(0), "(lane >> 2u) % 8u * 1u");
        assert_eq!(nvidia.expression(1), "(lane >> 0u) % 4u * 2u");
        let rows = nvidia.right_shares(0).unwrap();
        assert_eq!((rows.offsets, rows.ranks), (vec![0, 1, 8, 9], vec![0, 1, 2, 3, 0, 1, 2, 3]));
        assert_eq!((rows.parts, rows.part.as_str()), (4, "((lane >> 0u) & 1u) + (((lane >> 1u) & 1u) << 1u)"));
        assert_eq!(rows.part_of_place, "(place / 2u % 2u) + ((place / 4u % 2u) << 1u)");
        assert_eq!(rows.rank_of_place, "(place / 1u % 2u) + ((place / 8u % 2u) << 1u)");
        let columns = ElementLayout::LLVMPIPE.right_shares(1).unwrap();
        assert_eq!((columns.offsets.len(), columns.parts, columns.part.as_str()), (8, 1, "0u"));
        let rows = ElementLayout::LLVMPIPE.right_shares(0).unwrap();
        assert_eq!((rows.offsets, rows.ranks, rows.parts), (vec![0], vec![0; 8], 8));
        assert_eq!(rows.rank_of_place, "0u");
        assert_eq!(ElementLayout::LLVMPIPE.row_lanes(), [1, 2, 4]);
        assert_eq!(ElementLayout::LLVMPIPE.expression(0), "0u");
    }

    /// A lane's columns are neighbours, and no two columns of a tile have one place.
    #[test]
    fn lanes_have_neighbouring_columns() {
        for (side, layout) in [(16, ElementLayout::NVIDIA), (8, ElementLayout::LLVMPIPE)] {
            let own = layout.columns();
            let in_group = 4 / own.len() as u32 * side;
            let mut columns: Vec<u32> = (0..4 * in_group).map(|place| layout.column_at(side, place)).collect();
            for (place, column) in (0..).zip(&columns) {
                assert_eq!(column / in_group, place / in_group);
            }
            // The four elements of a lane are neighbours.
            let steps: Vec<u32> =
                (0..4 / own.len() as u32).flat_map(|n| own.iter().map(move |c| n * side + c)).collect();
            for lane in 0..layout.lanes {
                let first = layout.place(lane, 0)[1];
                let of_lane: Vec<u32> = steps.iter().map(|step| columns[(first + step) as usize]).collect();
                assert!(
                    of_lane[0].is_multiple_of(4) && (0..4).all(|n| of_lane[n] == of_lane[0] + n as u32),
                    "{of_lane:?}"
                );
            }
            columns.sort_unstable();
            assert!(columns.into_iter().eq(0..4 * in_group));
        }
        let nvidia = ElementLayout::NVIDIA;
        assert_eq!(nvidia.quad_expression(), "(lane >> 0u) % 4u * 4u");
        let bits = "(place >> 0u) % 2u * 1u + (place >> 1u) % 4u * 4u";
        assert_eq!(nvidia.column_at_expression(16, "place", Some(8)), bits);
        let all = format!("place / 16u * 16u + {bits} + (place >> 3u) % 2u * 2u");
        assert_eq!(nvidia.column_at_expression(16, "place", None), all);
    }

    #[test]
    fn what_kernels_cannot_use_is_told() {
        let refused = |side, lanes, elements: &[u32]| ElementLayout::new(side, lanes, elements).unwrap_err();
        assert!(refused(8, 7, &[0; 64]).contains("7 lanes do not share 8x8"));
        assert!(refused(8, 8, &[0; 63]).contains("evenly"));
        let mut swapped = elements(ElementLayout::NVIDIA, 16);
        swapped.swap(9, 11);
        assert!(refused(16, 32, &swapped).contains("component 1 of lane 1"));
        swapped.swap(0, 1);
        assert!(refused(16, 32, &swapped).contains("the first component"));
        // Rows are in one lane, eight elements each.
        let rows: Vec<u32> = (0..64).collect();
        assert!(refused(8, 8, &rows).contains("8 elements of a row"));
        // Two lanes with the same elements, as RDNA 3 has left operands.
        let twice: Vec<u32> = (0..256).map(|n| n / 8 / 2 * 16 + n % 8).collect();
        assert!(refused(16, 32, &twice).contains("two lanes"));
    }
}
