//! Addresses by the stage that translates them.

use crate::addr::Gpa;

/// An address of one of the stages' address spaces.
pub(super) trait Address: Copy {
    fn new(bits: u64) -> Self;
    fn bits(self) -> u64;
}

/// An input address of a stage 1 table, without the bits that select the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Va(pub u64);

/// An output of stage 1 and an input of stage 2; physical without stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ipa(pub u64);

macro_rules! address {
    ($name:ty, $new:expr, $bits:expr) => {
        impl Address for $name {
            fn new(bits: u64) -> Self {
                $new(bits)
            }

            fn bits(self) -> u64 {
                $bits(self)
            }
        }
    };
}

address!(Va, Va, |Va(bits)| bits);
address!(Ipa, Ipa, |Ipa(bits)| bits);
address!(Gpa, Gpa, |Gpa(bits)| bits);
// Inside a walk, of either stage.
address!(u64, u64::from, u64::from);
