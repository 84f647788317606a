//! Registers with which an x86_64 guest ends the machine; an aarch64 guest calls
//! PSCI instead. The crate `arch` has their addresses and values.

use crate::bus::BusDevice;

/// A byte register that calls `on_request`, on the vCPU thread that writes it,
/// when the bits of `mask` have the value `value`. The bytes after it are status:
/// they ignore writes. All of them read as zero.
pub struct PowerRegister<F> {
    mask: u8,
    value: u8,
    on_request: F,
}

impl<F: Fn() + Send + Sync> PowerRegister<F> {
    /// A register whose request is `value` under `mask`. `on_request` must not
    /// block.
    pub fn new((mask, value): (u8, u8), on_request: F) -> Self {
        Self {
            mask,
            value,
            on_request,
        }
    }
}

impl<F: Fn() + Send + Sync> BusDevice for PowerRegister<F> {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, &[value]) = (offset, data)
            && value & self.mask == self.value
        {
            (self.on_request)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn only_the_value_under_the_mask_is_a_request() {
        let requests = AtomicUsize::new(0);
        let count = || {
            requests.fetch_add(1, Ordering::Relaxed);
        };
        let register = PowerRegister::new((0x3c, 0x34), count);
        // The enable bit is clear, another type, another width, the status.
        let others: [(u64, &[u8]); 4] = [(0, &[0x14]), (0, &[0x2c]), (0, &[0x34, 0]), (1, &[0x34])];
        for (offset, data) in others {
            register.write(offset, data);
        }
        assert_eq!(requests.load(Ordering::Relaxed), 0);
        register.write(0, &[0x34]);
        register.write(0, &[0xf7]);
        assert_eq!(requests.load(Ordering::Relaxed), 2);
        let mut status = [0xff; 2];
        register.read(0, &mut status);
        assert_eq!(status, [0; 2]);
    }
}
