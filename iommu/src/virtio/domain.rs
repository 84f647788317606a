//! Domains and their mappings.

use std::collections::{BTreeMap, BTreeSet};

use super::spec::Status;
use crate::{Gpa, Iova, IovaRange, Mapping, Perm, StreamId};

/// Where a mapping ends and what it means; its start is its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    last: Iova,
    gpa: Gpa,
    perm: Perm,
}

impl Target {
    fn mapping(self, first: Iova) -> Option<Mapping> {
        Some(Mapping {
            iova: IovaRange::new(first, self.last).ok()?,
            gpa: self.gpa,
            perm: self.perm,
        })
    }
}

/// Mappings that do not overlap, each as the driver made it.
#[derive(Clone, Debug, Default)]
pub struct Mappings(BTreeMap<Iova, Target>);

impl Mappings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The mapping that `iova` lies in.
    pub fn find(&self, iova: Iova) -> Option<Mapping> {
        let (&first, target) = self.0.range(..=iova).next_back()?;
        target
            .mapping(first)
            .filter(|mapping| mapping.iova.contains(iova))
    }

    /// Adds a mapping that must overlap none (§5.13.6.5.2).
    pub fn insert(&mut self, mapping: Mapping) -> Result<(), Status> {
        let before = self.0.range(..=mapping.iova.last()).next_back();
        if before.is_some_and(|(_, target)| target.last >= mapping.iova.first()) {
            return Err(Status::Inval);
        }
        self.0.insert(
            mapping.iova.first(),
            Target {
                last: mapping.iova.last(),
                gpa: mapping.gpa,
                perm: mapping.perm,
            },
        );
        Ok(())
    }

    /// Removes every mapping in `range`, and none when one of them would have
    /// to be split (§5.13.6.6.2). Says how many there were.
    pub fn remove(&mut self, range: IovaRange) -> Result<usize, Status> {
        let below = self.0.range(..range.first()).next_back();
        let splits_first = below.is_some_and(|(_, target)| target.last >= range.first());
        let highest = self.0.range(range.first()..=range.last()).next_back();
        let splits_last = highest.is_some_and(|(_, target)| target.last > range.last());
        if splits_first || splits_last {
            return Err(Status::Range);
        }
        let mut inside = self.0.split_off(&range.first());
        if let Some(next) = range.last().checked_add(1) {
            let mut above = inside.split_off(&next);
            self.0.append(&mut above);
        }
        Ok(inside.len())
    }

    /// Those that overlap `range`, in order.
    pub fn iter(&self, range: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        let start = self
            .find(range.first())
            .map_or(range.first(), |mapping| mapping.iova.first());
        self.0
            .range(start..=range.last())
            .filter_map(|(&first, target)| target.mapping(first))
    }
}

/// A domain: it exists while an endpoint is attached to it.
#[derive(Clone, Debug, Default)]
pub struct Domain {
    /// Every address is itself; it has no mappings.
    pub bypass: bool,
    /// Who is attached.
    pub endpoints: BTreeSet<StreamId>,
    /// What is mapped.
    pub mappings: Mappings,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).unwrap()
    }

    fn mapping(first: u64, last: u64) -> Mapping {
        Mapping {
            iova: range(first, last),
            gpa: Gpa(first + 1000),
            perm: Perm::READ,
        }
    }

    #[test]
    fn unmap_that_splits_a_mapping_is_refused() {
        let mut mappings = Mappings::default();
        mappings.insert(mapping(10, 19)).unwrap();
        mappings.insert(mapping(20, 29)).unwrap();
        for part in [range(10, 18), range(11, 19), range(15, 29), range(0, 25)] {
            assert_eq!(mappings.remove(part), Err(Status::Range), "{part}");
        }
        assert_eq!(mappings.len(), 2);
        assert_eq!(mappings.remove(range(0, 50)), Ok(2));
    }

    #[test]
    fn last_byte_of_the_address_space_can_be_mapped() {
        let mut mappings = Mappings::default();
        let top = Mapping {
            iova: range(u64::MAX - 0xfff, u64::MAX),
            gpa: Gpa(0),
            perm: Perm::READ,
        };
        mappings.insert(top).unwrap();
        assert_eq!(mappings.find(Iova(u64::MAX)), Some(top));
        assert_eq!(mappings.remove(IovaRange::ALL), Ok(1));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Map(u64, u64),
        Unmap(u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let ends = (0_u64..48, 0_u64..8).prop_map(|(first, more)| (first, first + more));
        prop_oneof![
            ends.clone().prop_map(|(a, b)| Op::Map(a, b)),
            ends.prop_map(|(a, b)| Op::Unmap(a, b)),
        ]
    }

    proptest! {
        /// The naive model: for each address, the mapping it belongs to.
        #[test]
        fn mappings_agree_with_a_table_of_addresses(
            ops in prop::collection::vec(op(), 1..60),
        ) {
            let mut mappings = Mappings::default();
            let mut table: [Option<(u64, u64)>; 64] = [None; 64];
            for op in ops {
                match op {
                    Op::Map(first, last) => {
                        let cells = first as usize..=last as usize;
                        let free = table[cells.clone()].iter().all(Option::is_none);
                        prop_assert_eq!(mappings.insert(mapping(first, last)).is_ok(), free);
                        if free {
                            table[cells].fill(Some((first, last)));
                        }
                    }
                    Op::Unmap(first, last) => {
                        let whole = table[first as usize..=last as usize]
                            .iter()
                            .flatten()
                            .all(|&(a, b)| a >= first && b <= last);
                        let removed = mappings.remove(range(first, last));
                        prop_assert_eq!(removed.is_ok(), whole);
                        if whole {
                            table[first as usize..=last as usize].fill(None);
                        }
                    }
                }
                for (at, cell) in table.iter().enumerate() {
                    let found = mappings.find(Iova(at as u64));
                    prop_assert_eq!(found, cell.map(|(a, b)| mapping(a, b)));
                }
                let distinct: BTreeSet<_> = table.iter().flatten().collect();
                prop_assert_eq!(mappings.iter(IovaRange::ALL).count(), distinct.len());
            }
        }
    }
}
