//! A copy of configuration space that the guest reads without an exit.

use std::ops::Range;

/// Memory that the guest reads in place of functions' configuration space. The
/// guest's writes still reach the root complex.
pub trait ConfigImage: Send + Sync {
    /// Stores bytes of the function at a device number. `offset` and the length
    /// are multiples of 4. Each double word changes at once.
    fn store(&self, slot: u8, offset: u16, bytes: &[u8]);

    /// Ends the copy of a function: when this returns, no vCPU reads it, and
    /// reads reach the root complex.
    fn withdraw(&self, slot: u8);
}

/// Result of a write to a function's configuration space.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ConfigWritten {
    /// Changes of the BARs' addresses. The caller moves the BARs on the bus.
    pub moves: Vec<super::BarMove>,
    /// Offsets of the bytes that may have changed; both ends are multiples of 4.
    pub changed: Range<u16>,
    /// A read of the function's registers has an effect from now on, or returns
    /// something else than the last value.
    pub reads_have_effects: bool,
}
