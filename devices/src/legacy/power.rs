//! ACPI sleep and reset registers of a hardware-reduced platform (x86_64; an
//! aarch64 guest calls PSCI instead).
//!
//! ACPI 6.5 §4.8.3.7: sleep control register, sleep status register; §4.8.3.6:
//! reset register. The FADT has their addresses and the reset value; the DSDT's
//! `\_S5` object has the sleep type.

use crate::bus::BusDevice;

/// Bytes of I/O space of the registers.
pub const POWER_LEN: u64 = 3;
/// Offset of the sleep control register, one byte.
pub const SLEEP_CONTROL_OFFSET: u64 = 0;
/// Offset of the sleep status register, one byte.
pub const SLEEP_STATUS_OFFSET: u64 = 1;
/// Offset of the reset register, one byte.
pub const RESET_OFFSET: u64 = 2;
/// Value of the reset register that resets the machine.
pub const RESET_VALUE: u8 = 1;
/// The `SLP_TYP` value of S5, soft off, the only supported sleeping state.
pub const POWER_OFF_SLEEP_TYPE: u8 = 5;

/// `SLP_TYPx` is bits 2 to 4 of the sleep control register, `SLP_EN` bit 5.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Request of the guest to the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power the machine off (S5).
    Off,
    /// Reset the machine.
    Reset,
}

/// The registers. `on_request` runs on the vCPU thread that wrote them, each
/// time they are written, and must not block.
pub struct Power<F> {
    on_request: F,
}

impl<F: Fn(PowerRequest) + Send + Sync> Power<F> {
    /// Registers that call `on_request`.
    pub fn new(on_request: F) -> Self {
        Self { on_request }
    }
}

impl<F: Fn(PowerRequest) + Send + Sync> BusDevice for Power<F> {
    /// All registers read as zero: no sleep enabled, no wake status.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL_OFFSET
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == POWER_OFF_SLEEP_TYPE =>
            {
                (self.on_request)(PowerRequest::Off);
            }
            RESET_OFFSET if value == RESET_VALUE => (self.on_request)(PowerRequest::Reset),
            _ => {}
        }
    }
}

/// Bytes of I/O space of a [`KeyboardReset`].
pub const KEYBOARD_RESET_LEN: u64 = 1;
/// Command of the keyboard controller that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The command port of a keyboard controller (0x64) without a keyboard: for a
/// guest that reboots through it (`reboot=k`), as Firecracker's do.
pub struct KeyboardReset<F> {
    on_request: F,
}

impl<F: Fn(PowerRequest) + Send + Sync> KeyboardReset<F> {
    /// A port that calls `on_request`, as [`Power`] does.
    pub fn new(on_request: F) -> Self {
        Self { on_request }
    }
}

impl<F: Fn(PowerRequest) + Send + Sync> BusDevice for KeyboardReset<F> {
    /// The status is zero: no key to read, and ready for a command.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            (self.on_request)(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn requests(writes: &[(u64, &[u8])]) -> Vec<PowerRequest> {
        let seen = Mutex::new(Vec::new());
        let power = Power::new(|request| seen.lock().unwrap().push(request));
        for (offset, data) in writes {
            power.write(*offset, data);
        }
        seen.into_inner().unwrap()
    }

    #[test]
    fn s5_with_the_enable_bit_is_power_off() {
        let s5 = POWER_OFF_SLEEP_TYPE << 2;
        assert_eq!(
            requests(&[(SLEEP_CONTROL_OFFSET, &[s5 | 0x20])]),
            [PowerRequest::Off]
        );
        // Without SLP_EN, with another type, with another width: nothing.
        assert_eq!(
            requests(&[
                (SLEEP_CONTROL_OFFSET, &[s5]),
                (SLEEP_CONTROL_OFFSET, &[3 << 2 | 0x20]),
                (SLEEP_CONTROL_OFFSET, &[s5 | 0x20, 0]),
            ]),
            []
        );
    }

    #[test]
    fn the_keyboard_controller_pulses_reset() {
        let seen = Mutex::new(Vec::new());
        let port = KeyboardReset::new(|request| seen.lock().unwrap().push(request));
        port.write(0, &[0xd1]);
        port.write(0, &[PULSE_RESET]);
        let mut status = [0xff];
        port.read(0, &mut status);
        assert_eq!(status, [0]);
        assert_eq!(seen.into_inner().unwrap(), [PowerRequest::Reset]);
    }

    #[test]
    fn only_the_reset_value_resets() {
        assert_eq!(
            requests(&[(RESET_OFFSET, &[0]), (RESET_OFFSET, &[RESET_VALUE])]),
            [PowerRequest::Reset]
        );
    }
}
